"""All of SGLang's private API that kdflow uses, and the platform plugin for plain CPUs."""
