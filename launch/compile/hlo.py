"""Reads collectives and HBM traffic from a compiled program's text.

Only the text lists the collectives that the compiler inserted, and the compiler's own totals take a
loop's body once.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
# Instructions that only name, group or wait for the results of others.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while")
FREE += ("conditional", "call", "opt-barrier", "partition-id", "replica-id", "iota")

SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # opcode -> index of the operand written

_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)"
    r"=\{?([^{},]+(?:, %[^{},]+)*)"
)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        type: of its result, as printed.
        opcode: "fusion", "all-reduce", …
        operands: names of instructions.
        attributes: the rest of the line.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Collective(NamedTuple):
    """All collectives of a kind in a program, as one chip sees them.

    Attributes:
        count: how many run.
        bytes: bytes that a chip receives in a ring, which is the least possible.
        largest: the type of the largest one, and the operation in our code that it comes from.
    """

    count: int
    bytes: float
    largest: str


class Program:
    """The computations of a compiled program, and how often each runs."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._types: dict[str, dict[str, str]] = {}
        entry = ""
        name = ""
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([^\s(]+) \(", line)):
                name = head[2]
                entry = name if head[1] else entry
                self._computations[name] = []
            elif name and (instruction := _parse(line)):
                self._computations[name].append(instruction)
            elif line == "}":
                name = ""
        self._parameters: dict[str, dict[int, str]] = {}
        for name, instructions in self._computations.items():
            self._types[name] = {i.name: i.type for i in instructions}
            self._parameters[name] = {
                _number(i.attributes): i.name for i in instructions if i.opcode == "parameter"
            }
        # How often each computation runs by control flow, and as the inside of a fusion.
        self._runs: dict[str, int] = collections.Counter()
        self._fused: dict[str, int] = collections.Counter()
        self.unknown_loops = 0
        self._visit(entry, 1)

    def collectives(self, devices: int) -> dict[str, Collective]:
        """Returns the collectives that run, by kind.

        Args:
            devices: chips in the program; a group of unknown size is taken to be all of them.
        """
        found: dict[str, list[tuple[int, float, str]]] = collections.defaultdict(list)
        # Channels whose collective is split into parts, of which only the start is counted.
        started = {
            _channel(instruction)
            for _, instructions, _ in self._running()
            if _starts(instructions)
            for instruction in instructions
            if _kind(instruction)
        }
        for name, instructions, runs in self._running():
            starts = _starts(instructions)
            sliced = any(i.opcode == "dynamic-slice" for i in instructions)
            for instruction in instructions:
                kind = _kind(instruction)
                if not kind or (_channel(instruction) in started and not starts):
                    continue
                if kind == "all-reduce" and sliced and name in self._fused:
                    kind = "reduce-scatter"  # the chip keeps only its slice of the sum
                size = self._received(name, instruction, kind, devices)
                origin = re.search(r'op_name="([^"]*)"', instruction.attributes)
                shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", instruction.type)
                what = f"{shape[:80]} of {(origin[1] if origin else instruction.name)[:100]}"
                found[kind].append((runs, size, what))
        return {
            kind: Collective(
                sum(runs for runs, _, _ in each),
                math.fsum(runs * size for runs, size, _ in each),
                max(each, key=lambda entry: entry[1])[2],
            )
            for kind, each in sorted(found.items())
        }

    def hbm_bytes(self) -> float:
        """Estimates the bytes that the program reads from and writes to HBM, loops included.

        Every instruction outside a fusion reads its operands and writes its result. Arrays in
        on-chip memory are free. Of an array that a fusion slices or updates, only the slice counts.
        """
        total = 0.0
        for name, runs in self._runs.items():
            for instruction in self._computations[name]:
                total += runs * self._traffic(name, instruction)
        return total

    def _running(self) -> Iterator[tuple[str, list[Instruction], int]]:
        for runs in (self._runs, self._fused):
            for name, count in runs.items():
                yield name, self._computations[name], count

    def _visit(self, name: str, runs: int) -> None:
        self._runs[name] += runs
        for instruction in self._computations[name]:
            called = [c for c in _called(instruction.attributes) if c in self._computations]
            if instruction.opcode == "while":
                times = self._trip_count(instruction)
                body = _named(instruction.attributes, "body")
                self._visit(body, runs * times)
            elif instruction.opcode in ("call", "conditional"):
                for computation in called:
                    self._visit(computation, runs)
            elif instruction.opcode in ("fusion", "async-start", "custom-call"):
                for computation in called:
                    self._visit_fused(computation, runs)

    def _visit_fused(self, name: str, runs: int) -> None:
        self._fused[name] += runs
        for instruction in self._computations[name]:
            if instruction.opcode in ("fusion", "call", "custom-call"):
                for called in _called(instruction.attributes):
                    if called in self._computations:
                        self._visit_fused(called, runs)

    def _trip_count(self, loop: Instruction) -> int:
        known = re.search(r'known_trip_count":?\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = _named(loop.attributes, "condition")
        bounds = set()
        pending = [condition]
        while pending:
            for instruction in self._computations.get(pending.pop(), ()):
                if instruction.opcode == "constant" and re.match(r"[su]32\[\]", instruction.type):
                    bounds.add(_number(instruction.attributes))
                pending += _called(instruction.attributes)
        if len(bounds) == 1 and min(bounds) > 0:
            return min(bounds)
        self.unknown_loops += 1
        return 1

    def _received(self, name: str, instruction: Instruction, kind: str, devices: int) -> float:
        """Returns the bytes that a chip receives in a collective over a ring."""
        group = _group_size(instruction.attributes) or devices
        operands = math.fsum(self._size(name, operand) for operand in instruction.operands)
        if kind == "collective-permute":
            return operands
        if kind == "all-gather":
            return operands * (group - 1)
        return operands * (group - 1) / group * (2 if kind == "all-reduce" else 1)

    def _size(self, name: str, operand: str) -> float:
        return type_bytes(self._types[name].get(operand, ""))

    def _traffic(self, name: str, instruction: Instruction) -> float:
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return 0.0
        if opcode == "custom-call" and not instruction.operands:
            return 0.0  # memory that is allocated, but not written yet
        types = self._types[name]
        if opcode.endswith("-start"):
            return self._copied(types, instruction)
        if opcode == "fusion":
            return self._fusion_traffic(types, instruction)
        if opcode in SLICES:
            return 2 * hbm_type_bytes(instruction.type)
        if opcode in UPDATES:
            return 2 * hbm_type_bytes(types.get(instruction.operands[UPDATES[opcode]], ""))
        read = math.fsum(hbm_type_bytes(types.get(o, "")) for o in set(instruction.operands))
        return read + hbm_type_bytes(instruction.type)

    def _copied(self, types: dict[str, str], instruction: Instruction) -> float:
        """Counts an asynchronous copy's or slice's destination once for each end that is in HBM."""
        results = [m for m in _ARRAY.finditer(instruction.type)]
        source = types.get(instruction.operands[0], "") if instruction.operands else ""
        sizes = [_array_bytes(m) for m in results]
        moved = min((s for s in sizes if s > 8), default=0.0)
        ends = (source, *(m[0] for m in results[:2] if _array_bytes(m) == moved))
        return moved * min(2, sum(bool(hbm_type_bytes(end)) for end in ends[:2]))

    def _fusion_traffic(self, types: dict[str, str], fusion: Instruction) -> float:
        inside = self._inside(fusion)
        if inside is None:
            return 0.0
        total = 0.0
        for index, operand in enumerate(fusion.operands):
            if hbm_type_bytes(types.get(operand, "")):
                total += self._read(inside, self._parameters[inside].get(index, ""))
        root = self._computations[inside][-1]
        results = [match[0] for match in _ARRAY.finditer(fusion.type)]
        parts = root.operands if root.opcode == "tuple" else (root.name,)
        if len(parts) != len(results):
            return total + hbm_type_bytes(fusion.type)
        return total + math.fsum(
            self._written(inside, part)
            for part, result in zip(parts, results, strict=True)
            if hbm_type_bytes(result)
        )

    def _read(self, name: str, value: str) -> float:
        """Counts the bytes of a value that a fusion reads: slices, if it reads only slices."""
        whole = self._size(name, value)
        read = 0.0
        for user in self._computations[name]:
            if value not in user.operands:
                continue
            inside = self._inside(user)
            if user.opcode == "bitcast":
                read += self._read(name, user.name)
            elif inside is not None:
                read += math.fsum(
                    self._read(inside, self._parameters[inside].get(index, ""))
                    for index, operand in enumerate(user.operands)
                    if operand == value
                )
            elif user.opcode in SLICES and user.operands[0] == value:
                read += type_bytes(user.type)
            elif user.opcode not in UPDATES or user.operands[0] != value:
                return whole
        return min(read, whole)

    def _written(self, name: str, value: str) -> float:
        """Counts the bytes of a value that a fusion writes: of an in-place update, the update."""
        made = next((i for i in self._computations[name] if i.name == value), None)
        if made is None:
            return 0.0
        if made.opcode == "bitcast":
            return self._written(name, made.operands[0])
        if made.opcode in UPDATES:
            return self._size(name, made.operands[UPDATES[made.opcode]])
        inside = self._inside(made)
        if inside is not None and not made.type.startswith("("):
            return self._written(inside, self._computations[inside][-1].name)
        return type_bytes(made.type)

    def _inside(self, instruction: Instruction) -> str | None:
        """Returns the computation that a fusion runs; None for any other instruction."""
        if instruction.opcode != "fusion":
            return None
        return next((c for c in _called(instruction.attributes) if c in self._computations), None)


def type_bytes(text: str) -> float:
    """Returns the bytes of all arrays in a printed type."""
    return math.fsum(_array_bytes(m) for m in _ARRAY.finditer(text))


def hbm_type_bytes(text: str) -> float:
    """Returns the bytes of a printed type's arrays in HBM: others have a memory space, S(n)."""
    return math.fsum(
        _array_bytes(m) for m in _ARRAY.finditer(text) if not re.search(r"S\([1-9]", m[3] or "")
    )


def _array_bytes(match: re.Match) -> float:
    dtype, shape = match[1], match[2]
    bits = BITS.get(dtype)
    if bits is None:
        digits = re.match(r"[a-z]+(\d+)", dtype)
        bits = int(digits[1]) if digits else 0
    return bits / 8 * math.prod(int(n) for n in shape.split(",") if n)


def _parse(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?(\S+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"([a-z0-9-]+)\(", rest)
    if not opcode:
        return None
    end = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end]
    # A constant has its value, and a parameter its number, in the place of operands.
    literal = opcode[1] in ("constant", "parameter")
    operands = () if literal else tuple(re.findall(r"%([^\s,()]+)", inside))
    return Instruction(
        head[1], kind, opcode[1], operands, (inside if literal else "") + rest[end + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Returns the position where the bracket that opens at `start` closes."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    return len(text)


def _number(attributes: str) -> int:
    """Returns the whole number with which attributes begin."""
    found = re.match(r"-?\d+", attributes)
    assert found is not None, attributes
    return int(found[0])


def _named(attributes: str, key: str) -> str:
    """Returns the computation that a loop's attributes give as its body or condition."""
    found = re.search(rf"{key}=%?([^\s,]+)", attributes)
    assert found is not None, attributes
    return found[1]


def _called(attributes: str) -> list[str]:
    """Returns the names of the computations that an instruction runs."""
    return [n.strip(" %") for group in _CALLED.findall(attributes) for n in group.split(",")]


def _kind(instruction: Instruction) -> str:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def _starts(instructions: list[Instruction]) -> bool:
    """Returns whether a computation starts a collective that others complete."""
    return any(
        i.opcode == "custom-call" and '"AsyncCollectiveStart"' in i.attributes for i in instructions
    )


def _channel(instruction: Instruction) -> str:
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return channel[1] if channel else instruction.name


def _group_size(attributes: str) -> int:
    """Returns the number of chips in a collective's group; 0 where the text does not give it."""
    listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    grid = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if grid:
        return int(grid[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return 0
