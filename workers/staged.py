"""Forward passes that stop in front of a layer, so that it can be pruned before it runs.

Each pass is a greenlet: it goes on, in this thread, where it stopped. So any module can be walked
through layer by layer, without knowing what lies between its layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from jobs.errors import ModelError


class StoppedPass:
    """One forward pass, under `stops`. It starts with the first `run_to`."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._greenlet = _Pass(run)

    def run_to(self, names: tuple[str, ...]) -> Tensor:
        """Go on to the next stop, which is one of these layers. What they are about to read.

        Raises:
            ModelError: it stopped in front of another layer, or came to its end.
        """
        arrived = self._greenlet.switch()
        if self._greenlet.dead or self._greenlet.stop not in names:
            where = "its end" if self._greenlet.dead else self._greenlet.stop
            raise _irregular(f"{names[0]} was to run next, and the pass came to {where}")
        tensor: Tensor = arrived
        return tensor

    def run_to_end(self) -> Tensor:
        """The output of the pass.

        Raises:
            ModelError: it stopped in front of a layer again.
        """
        output: Tensor = self._greenlet.switch()
        if not self._greenlet.dead:
            raise _irregular(f"the pass came to {self._greenlet.stop} a second time")
        return output


class _Pass(greenlet):
    stop: str = ""
    """The layer in front of which it stopped last."""
    input_id: int = 0
    """Identity of the tensor which that layer reads."""


@contextmanager
def stops(linears: Mapping[str, nn.Module], taps: Mapping[str, object]) -> Iterator[set[str]]:
    """Make every `StoppedPass` stop in front of these layers.

    Args:
        taps: by layer, anything that is equal for those that read one tensor.

    Yields:
        The layers that are passed without a stop: whoever has pruned some adds their names.
    """
    open_: set[str] = set()

    def arrive(name: str, tensor: Tensor) -> None:
        this = getcurrent()
        assert isinstance(this, _Pass), "only passes run through layers that stop them"
        assert this.parent is not None
        if name not in open_:
            this.stop, this.input_id = name, id(tensor)
            this.parent.switch(tensor)
        elif taps[name] == taps[this.stop] and id(tensor) != this.input_id:
            raise _irregular(f"{name} and {this.stop} read one tensor elsewhere, and here two")

    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: arrive(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        yield open_
    finally:
        for handle in handles:
            handle.remove()


def _irregular(what: str) -> ModelError:
    return ModelError(
        f"{what}: the block does not run its layers in the same way for all samples and blocks. "
        "Calibrate it with propagate: pruned"
    )
