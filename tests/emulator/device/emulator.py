"""Load the PTX emulator, whose C interface is in tests/emulator/core/emulator.h."""

from __future__ import annotations

import ctypes
from pathlib import Path

Grid = ctypes.c_uint32 * 3
_LONGEST = 1 << 20  # bytes of a report


class Emulator:
    """Is the emulator of one process."""

    def __init__(self, path: Path) -> None:
        # PyDLL keeps the lock of the interpreter: no other thread launches meanwhile.
        library = ctypes.PyDLL(str(path))
        self.library = library
        library.emulator_load.argtypes = [ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p]
        library.emulator_launch.argtypes = [
            ctypes.c_uint64, Grid, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p,
        ]  # fmt: skip
        library.emulator_error.restype = ctypes.c_char_p
        library.emulator_report.argtypes = [ctypes.c_char_p, ctypes.c_int]
        library.emulator_configure.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        library.emulator_configure.restype = None
        library.emulator_instructions.restype = ctypes.c_uint64
        self._text = ctypes.create_string_buffer(_LONGEST)

    def load(self, function: int, ptx: bytes, name: bytes) -> str | None:
        """Parse a kernel; what is wrong with it, or None."""
        return self._error(self.library.emulator_load(function, ptx, name))

    def launch(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, parameters: int
    ) -> str | None:
        """Run a kernel; why it could not go on, or None."""
        library = self.library
        return self._error(
            library.emulator_launch(function, Grid(*grid), threads, shared, parameters)
        )

    def findings(self) -> list[str]:
        """What was found since the last call."""
        self.library.emulator_report(self._text, _LONGEST)
        return self._text.value.decode(errors="replace").splitlines()

    def configure(self, name: str, value: int) -> None:
        """Set "check" (0, 1), "order" (0, 1, 2) or "budget" (instructions of a launch)."""
        self.library.emulator_configure(name.encode(), value)

    @property
    def instructions(self) -> int:
        """Warp instructions that have run."""
        return int(self.library.emulator_instructions())

    def _error(self, code: int) -> str | None:
        if not code:
            return None
        text: bytes = self.library.emulator_error()
        return text.decode(errors="replace") or "an error without words"
