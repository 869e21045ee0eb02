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
        self._weights_there = self._states_there = True

    def sleep(self) -> None:
        """Leave the device. Nothing to do when asleep."""
        self._have(weights=False, states=False)

    def bring_weights(self) -> None:
        """Have the weights on the device, and nothing else: to hand them over."""
        self._have(weights=True, states=False)

    def wake(self) -> None:
        """Come back. Nothing to do when awake."""
        self._have(weights=True, states=True)

    def _have(self, *, weights: bool, states: bool) -> None:
        """Have these on the device, the others in host memory."""
        host = torch.device("cpu")
        leaving = (self._weights_there and not weights) or (self._states_there and not states)
        if self._states_there and not states:  # room for the weights first
            self._move_states(host)
        if weights != self._weights_there:
            self._module.to(self._device if weights else host)
        if states and not self._states_there:
            self._move_states(self._device)
        self._weights_there, self._states_there = weights, states
        if leaving and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _move_states(self, device: torch.device) -> None:
        for state in self._optimizers.states():
            for name, value in state.items():
                # Step counts stay where they are.
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[name] = value.to(device)
