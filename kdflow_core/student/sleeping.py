"""The student's weights and optimizer states in host memory while others use the device."""

import torch

from kdflow_core.student.optim import Optimizers


class StudentOffload:
    """Moves a sharded module and its optimizers to host memory and back to the device."""

    def __init__(
        self, module: torch.nn.Module, optimizers: Optimizers, device: torch.device
    ) -> None:
        self._module = module
        self._optimizers = optimizers
        self._device = device
        self._asleep = False

    def sleep(self) -> None:
        """Leave the device. Nothing to do when asleep."""
        if not self._asleep:
            self._move(torch.device("cpu"))
            self._asleep = True

    def wake(self) -> None:
        """Come back. Nothing to do when awake."""
        if self._asleep:
            self._move(self._device)
            self._asleep = False

    def _move(self, device: torch.device) -> None:
        self._module.to(device)
        for state in self._optimizers.states():
            for name, value in state.items():
                # Step counts stay where they are.
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[name] = value.to(device)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
