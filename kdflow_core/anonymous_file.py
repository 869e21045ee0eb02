"""A file of memory that other processes of the user can open, and that no crash leaves behind."""

import os
import tempfile


class AnonymousFile:
    """A file that is gone when this process is, however it ends. Others open it by its `path`."""

    def __init__(self, name: str) -> None:
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create(name)
            self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        else:  # not on Linux
            self.fd, self.path = tempfile.mkstemp(prefix=f"{name}-")

    def close(self) -> None:
        """Let it go. May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            if not self.path.startswith("/proc/"):
                os.unlink(self.path)
