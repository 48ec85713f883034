"""What runs until it is closed, as a context manager: a base class, for one `close` in place of three methods."""

import abc
from typing import Self

__all__ = ["Closing"]


class Closing(abc.ABC):
    """Is closed at the end of a `with` block, however that ends."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends it. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
