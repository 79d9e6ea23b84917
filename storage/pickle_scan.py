"""Walk the opcodes of a pickle without running it, and refuse the ones that would hurt whoever does.

Python's unpickler allocates what a pickle asks for before it reads on: nine bytes that name memo slot 4,294,967,295
cost 64 GiB, and tuples nested by the million overflow the C stack when they are hashed. The walk costs about a
microsecond an opcode and bounds what the unpickler may do by the size of the file.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field

from storage.errors import InputError

MAX_TUPLE_WEIGHT = 10_000
"""Items a tuple may hold, its inner tuples' items counted as often as they are reached: a bound on the depth of the C
recursion that hashes it, and on its time (the same tuple twice, sixty levels deep, takes 2^60 steps)."""

_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_NAMES = {"GLOBAL", "INST"}  # a module and a name, a line each
_GETS = {"GET", "BINGET", "LONG_BINGET"}


class MalformedPickleError(InputError):
    """The bytes are no pickle, end too early, or ask for more than they can hold."""


@dataclass(frozen=True)
class _Opcode:
    """What one opcode reads and what it does to the stack."""

    name: str
    argument_bytes: int
    """Fixed size, or one of pickletools' negative codes for lines and counted arguments."""
    pops: int
    pops_to_mark: bool
    pushes: int

    @classmethod
    def of(cls, info: pickletools.OpcodeInfo) -> _Opcode:
        before = info.stack_before
        to_mark = pickletools.markobject in before
        items = before.index(pickletools.markobject) if to_mark else len(before)
        size = info.arg.n if info.arg is not None else 0
        return cls(info.name, size, items, to_mark, len(info.stack_after))


_OPCODES = {ord(info.code): _Opcode.of(info) for info in pickletools.opcodes}
_COUNT_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}


@dataclass
class _Walk:
    """An unpickler that keeps, instead of objects, the weight of each."""

    data: bytes
    what: str
    position: int = 0
    next_position: int = 0
    stack: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, int] = field(default_factory=dict)

    def refuse(self, why: str) -> MalformedPickleError:
        return MalformedPickleError(
            f"{self.what}: not a readable pickle: {why} at byte {self.position} of {len(self.data)}. "
            "Wanted: a whole pickle as its program wrote it. Fetch or write the file again."
        )

    def argument(self, size: int, two_lines: bool) -> bytes:
        """The argument's own bytes (for counted ones: nothing, only that they are all there)."""
        start = self.position + 1
        if size >= 0:
            end = start + size
        elif size == pickletools.UP_TO_NEWLINE:
            end = self.line_end(start)
        else:
            width, signed = _COUNT_BYTES[size]
            count = int.from_bytes(self.data[start : start + width], "little", signed=signed)
            end = start + width + count
            if count < 0 or end > len(self.data):
                raise self.refuse(f"a string of {count} bytes is announced that is not there")
            start = end
        if end > len(self.data):
            raise self.refuse("the file ends inside an argument")
        self.next_position = self.line_end(end) if two_lines else end
        return self.data[start:end]

    def line_end(self, start: int) -> int:
        end = self.data.find(b"\n", start) + 1
        if end == 0:
            raise self.refuse("a line without end")
        return end

    def pop(self, opcode: _Opcode) -> int:
        """Take what the opcode takes; the weights' sum."""
        weight = 0
        if opcode.pops_to_mark:
            if not self.marks:
                raise self.refuse(f"{opcode.name} without a mark")
            mark = self.marks.pop()
            weight = sum(self.stack[mark:])
            del self.stack[mark:]
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - opcode.pops < floor:
            raise self.refuse(f"{opcode.name} on an empty stack")
        for _ in range(opcode.pops):
            weight += self.stack.pop()
        return weight

    def step(self, opcode: _Opcode) -> None:
        name = opcode.name
        argument = self.argument(opcode.argument_bytes, name in _NAMES)
        if name == "POP" and self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()  # protocol 0 drops a mark with POP
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _PUTS:
            self.remember(self.slot(name, argument))
        elif name == "MEMOIZE":
            self.remember(len(self.memo))
        elif name in _GETS:
            self.recall(self.slot(name, argument))
        else:
            weight = self.pop(opcode)
            self.stack.extend([self.tuple_weight(weight) if name in _TUPLES else 1] * opcode.pushes)

    def tuple_weight(self, inside: int) -> int:
        if inside >= MAX_TUPLE_WEIGHT:
            raise self.refuse(f"tuples of more than {MAX_TUPLE_WEIGHT} items in all")
        return inside + 1

    def slot(self, name: str, argument: bytes) -> int:
        if name not in ("PUT", "GET"):
            return int.from_bytes(argument, "little")
        if not argument[:-1].isdigit() or len(argument) > 12:
            raise self.refuse(f"{name} with no slot number")
        return int(argument)

    def remember(self, slot: int) -> None:
        if slot > len(self.data):
            raise self.refuse(f"memo slot {slot} in so small a file")
        if not self.stack:
            raise self.refuse("a memo of an empty stack")
        self.memo[slot] = self.stack[-1]

    def recall(self, slot: int) -> None:
        if slot not in self.memo:
            raise self.refuse(f"memo slot {slot} is read before it is written")
        self.stack.append(self.memo[slot])


def check_pickle(data: bytes, what: str) -> None:
    """Refuse a pickle that is cut off, malformed, or would cost more memory or C stack than its own size warrants.

    `what` names the file in the error. Nothing is built and nothing runs.
    Raises MalformedPickleError.
    """
    walk = _Walk(data, what)
    while walk.position < len(data):
        opcode = _OPCODES.get(data[walk.position])
        if opcode is None or opcode.name in _EXTENSIONS:
            raise walk.refuse(f"opcode {data[walk.position]:#04x} is unknown here")
        if opcode.name == "STOP":
            return
        walk.step(opcode)
        walk.position = walk.next_position
    raise walk.refuse("no STOP")
