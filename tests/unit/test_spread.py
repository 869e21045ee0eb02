"""Where the layers of a model go that no device holds whole."""

import pytest
import torch

from kdflow_core.models.spread import layer_places

DEVICES = [torch.device("cuda", k) for k in range(3)]
REST = 24  # bytes of embedding and head
LAYERS = [10, 10, 10, 10]


@pytest.mark.parametrize(
    ("rooms", "expected"),
    [
        ([REST + 40], "0 0 0 0"),
        ([REST + 10, 30], "0 1 1 1"),
        ([REST + 9, 40], "1 1 1 1"),
        ([REST + 19, 15, 25], "0 1 2 2"),
        # Not all of them: those that come leave room for the one that is there and the next.
        ([REST + 39], "0 host host host"),
        ([REST + 29, 10], "1 host host host"),
        ([REST + 30, 10], "0 0 0 1"),
        ([REST + 10, 20], "1 1 host host"),
        ([0], "host host host host"),
    ],
)
def test_one_device_after_the_other_is_filled(rooms: list[int], expected: str) -> None:
    places = layer_places(LAYERS, REST, list(zip(DEVICES, rooms, strict=False)))
    assert " ".join("host" if p.comes else str(p.device.index) for p in places) == expected
    assert all(place.device == DEVICES[0] for place in places if place.comes)
