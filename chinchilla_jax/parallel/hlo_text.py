"""The text of an optimised HLO module, as `compiled.as_text()` prints it, as Python values.

Only what `hlo.py` needs is read: computations, instructions, array shapes with their memory
space, the groups of devices of a collective, and how often a loop runs. The text of CPU, GPU
and TPU compilers is one language; what differs is which instructions they leave in it.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

# Bits of one element. Sub-byte types are packed.
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8,
    "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32,
    "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)(?:\[([^\]]*)\])?(?:\{([^}]*)\})?")
_SPACING = re.compile(r"(?:[\s,]|/\*.*?\*/)*")
_PARENTHESIS = re.compile(r"[()]")
_SPACE = re.compile(r"S\((\d+)\)")
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? ?\{([^}]*)\}")
_AXIS = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?(?:,|$)")


class Array(NamedTuple):
  """The shape of one buffer.

  `space` is the memory space of its layout: 0 is the device's main memory (HBM); on TPUs
  1 is VMEM, 2, 4 and 6 hold flags and scalars, 3 is the CMEM of v4, 5 is the host's memory.
  """
  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Logical bytes: the padding of TPU tiles is not counted."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      if not self.dtype.startswith("f8"):
        raise ValueError(f"HLO: element type {self.dtype} has no known width")
      bits = 8
    return -(-self.size * bits // 8)


class Instruction(NamedTuple):
  """One line of a computation: `[ROOT] %name = shape opcode(inputs), attributes`."""
  name: str
  shape_text: str
  opcode: str
  inputs: str
  attributes: str
  root: bool

  @property
  def operands(self) -> tuple[str, ...]:
    """The names of the operands, in order."""
    return tuple(_NAME.findall(self.inputs))

  @property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays of the result, tuples flattened."""
    return leaves(parse_shape(self.shape_text))

  def callee(self, *keys: str) -> str | None:
    """The computation that an attribute of one of these keys names, or None."""
    found = re.search(rf"\b(?:{'|'.join(keys)})=\{{?%([\w.\-]+)", self.attributes)
    return found[1] if found else None

  def setting(self, key: str) -> str | None:
    """The value of `key="value"`, of `key=value` or of `"key":"value"`, or None."""
    found = re.search(rf'\b{key}"?[=:]"?([^",}}]*)', self.attributes)
    return found[1] if found else None


class Computation(NamedTuple):
  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    # The root is nearly always last.
    return next(i for i in reversed(self.instructions.values()) if i.root)

  def parameter(self, index: int) -> str:
    """The name of a parameter."""
    return next(i.name for i in self.instructions.values()
                if i.opcode == "parameter" and i.inputs == str(index))

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self.instructions[name] for name in instruction.operands]


class Module(NamedTuple):
  entry: str
  computations: dict[str, Computation]
  replica_count: int
  num_partitions: int
  header: str = ""  # The first line: what is donated, among other things.


def parse(text: str) -> Module:
  """Reads the text of a module. Linear in its length.

  Raises:
    ValueError: the text has no ENTRY computation.
  """
  header = text[: text.find("\n")]
  count = lambda key: int((re.search(rf"\b{key}=(\d+)", header) or [0, 1])[1])
  entry, computations, instructions = None, {}, None
  for line in text.splitlines():
    if line.startswith(" "):
      if instructions is not None and (found := _instruction(line)) is not None:
        newest = found.name
        instructions[newest] = found
    elif line.endswith("{") and line.startswith(("%", "ENTRY ")):
      name = _NAME.search(line)[1]
      if line.startswith("ENTRY "):
        entry = name
      instructions = {}
      computations[name] = Computation(name, instructions)
    elif instructions and line != "}" and not line.startswith("}, "):  # A kernel's attributes.
      begun = instructions[newest]
      instructions[newest] = begun._replace(attributes=begun.attributes + line)
    else:
      instructions = None
  if entry is None:
    raise ValueError("HLO: no ENTRY computation; give the text of compiled.as_text()")
  return Module(entry, computations, count("replica_count"), count("num_partitions"), header)


def _instruction(line: str) -> Instruction | None:
  """Splits one line, or returns None where it is not an instruction."""
  equals = line.find(" = ")
  if equals < 0:
    return None
  head = line[:equals].strip()
  start = equals + 3
  stop = _closing(line, start) + 1 if line.startswith("(", start) else line.find(" ", start)
  opening = line.find("(", stop)
  if stop <= 0 or opening < 0:
    return None
  closing = _closing(line, opening)
  return Instruction(head.removeprefix("ROOT ").removeprefix("%"), line[start:stop],
                     line[stop + 1:opening], line[opening + 1:closing], line[closing + 1:],
                     head.startswith("ROOT "))


def _closing(line: str, opening: int) -> int:
  """The position of the parenthesis that closes the one at `opening`."""
  depth = 0
  for mark in _PARENTHESIS.finditer(line, opening):
    depth += 1 if mark[0] == "(" else -1
    if depth == 0:
      return mark.start()
  return len(line)


@functools.lru_cache(maxsize=65536)
def parse_shape(text: str) -> Array | tuple:
  """`bf16[8,128]{1,0:T(8,128)S(1)}` -> Array; `(f32[], s32[2]{0})` -> tuple of them."""
  return _shape(text, 0)[0]


def _shape(text: str, at: int) -> tuple[Array | tuple, int]:
  at = _SPACING.match(text, at).end()
  if text.startswith("(", at):
    items = []
    at = _SPACING.match(text, at + 1).end()
    while at < len(text) and text[at] != ")":
      item, at = _shape(text, at)
      items.append(item)
      at = _SPACING.match(text, at).end()
    return tuple(items), at + 1
  if not (found := _ARRAY.match(text, at)):
    raise ValueError(f"HLO: cannot read the shape {text[:80]!r}")
  # A bounded dynamic dimension, `<=128`, counts as its bound.
  dims = tuple(map(int, re.findall(r"\d+", found[2] or "")))
  space = _SPACE.search(found[3] or "")
  return Array(found[1], dims, int(space[1]) if space else 0), found.end()


def leaves(shape: Array | tuple) -> tuple[Array, ...]:
  """The arrays of a shape, in order."""
  if isinstance(shape, Array):
    return (shape,)
  return tuple(leaf for item in shape for leaf in leaves(item))


_GROUPS = re.compile(
    r"\breplica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|" + _MESH.pattern
    + ")")


def device_groups(instruction: Instruction, replicas: int,
                  partitions: int) -> tuple[tuple[int, ...], ...]:
  """The groups of devices of a collective, as flattened ids: replica * partitions + partition.

  The ids in the text are flattened ids with `use_global_device_ids`. Without it they are
  partitions (all-to-all and its like) where there is a channel, and otherwise replicas. An
  empty list means all.

  Raises:
    ValueError: the groups are in a form this reader does not know.
  """
  found = _GROUPS.search(instruction.attributes)
  if not found and "replica_groups=" in instruction.attributes:
    raise ValueError(f"HLO: cannot read the replica_groups of %{instruction.name}")
  groups = _groups(found[1] if found else "{}")
  channel = "channel_id=" in instruction.attributes
  if "use_global_device_ids=true" in instruction.attributes:
    return groups or (tuple(range(replicas * partitions)),)
  every = [(p,) for p in range(partitions)]
  if channel and instruction.opcode.startswith(("all-to-all", "ragged", "collective-b")):
    pairs = [((r,), group) for r in range(replicas) for group in groups or (range(partitions),)]
  else:
    pairs = [(group, among) for group in groups or (range(replicas),)
             for among in ([range(partitions)] if channel else every)]
  return tuple(tuple(r * partitions + p for r in rs for p in ps) for rs, ps in pairs)


@functools.lru_cache(maxsize=4096)
def _groups(text: str) -> tuple[tuple[int, ...], ...]:
  if text.startswith("{"):
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"[\d,]+\d|\d", text))
  if text.startswith("["):
    shape, devices = text.split("<=")
    ids = _iota(devices).reshape(tuple(map(int, shape.strip("[]").split(","))))
  else:
    ids = _mesh_groups(*_MESH.match(text).groups())
  return tuple(map(tuple, ids.tolist()))


def _iota(text: str) -> np.ndarray:
  """`[2,4]T(1,0)`: the numbers 0 to 7 in that shape, transposed, flat."""
  dims, order = _IOTA.search(text).groups()
  dims = tuple(map(int, dims.split(",")))
  ids = np.arange(math.prod(dims)).reshape(dims)
  return ids.transpose(tuple(map(int, order.split(","))) if order else None).reshape(-1)


def _mesh_groups(axes: str, devices: str | None, over: str) -> np.ndarray:
  """`mesh['a'=4,'b'=2] {'a','b':(1)2}`: the groups along the axes, or along parts of them.

  `'a':(before)size` is the part of axis a of that size that has `before` outside it. The
  names are the compiler's own and need not be those of the program's mesh.
  """
  sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", axes)}
  devices = devices or f"[{math.prod(sizes.values())}]"
  ids = _iota(devices) if "[" in devices else np.array([int(d) for d in devices.split(",")])
  # One dimension for each part of an axis; a part in `over` is a member of the group.
  wanted, cuts = [], {name: {1, size} for name, size in sizes.items()}
  for name, before, size in _AXIS.findall(over):
    first = int(before or 1)
    last = first * int(size or sizes[name])
    wanted.append((name, first, last))
    cuts[name] |= {first, last}
  parts = [(name, first, last) for name in sizes
           for first, last in zip(sorted(cuts[name]), sorted(cuts[name])[1:], strict=False)]
  members = [parts.index(part) for item in wanted for part in parts
             if part[0] == item[0] and item[1] <= part[1] and part[2] <= item[2]]
  others = [i for i in range(len(parts)) if i not in members]
  ids = ids.reshape([last // first for _, first, last in parts]).transpose(others + members)
  return ids.reshape(-1, math.prod(ids.shape[len(others):]))


class Frame(NamedTuple):
  """A computation as it is called from one place.

  `arguments` are the caller's names of its parameters. A frame of a loop's body or condition
  also names the body.
  """
  computation: Computation
  caller: "Frame | None" = None
  call: Instruction | None = None
  arguments: tuple[str, ...] = ()
  loop_body: str | None = None


_Path = tuple[int, ...]
# These pass a scalar on as it is.
_PASS = {"copy", "copy-start", "copy-done", "bitcast", "convert", "optimization-barrier"}


def trip_count(module: Module, frame: Frame, loop: Instruction) -> int:
  """How often the body of a while instruction of `frame` runs.

  The compiler's `known_trip_count` where it left one (the TPU compiler does not); otherwise
  from a condition that compares a counter with a constant, the counter's start and its step,
  each followed through tuples, copies, fusions and enclosing loops.

  Raises:
    ValueError: the loop is of another form. The message names it.
  """
  known = re.search(r'known_trip_count"?[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', loop.attributes)
  if known:
    return int(known[1])
  body = loop.callee("body")
  test = Frame(module.computations[loop.callee("condition")], frame, loop, loop.operands, body)
  root = test.computation.root
  while root.opcode in ("fusion", "call"):
    callee = module.computations[root.callee("calls", "to_apply")]
    test = Frame(callee, test, root, root.operands)
    root = callee.root
  inside = Frame(module.computations[body], frame, loop, loop.operands, body)
  ways = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}
  for way, (left, right) in ((root.setting("direction"), root.operands),
                             (ways.get(root.setting("direction")), root.operands[::-1])
                             ) if root.opcode == "compare" else ():
    counter, limit = _affine(module, test, left, ()), _constant(module, test, right, ())
    if counter is None or counter[0] is None or limit is None:
      continue
    start = _constant(module, frame, loop.operands[0], counter[0])
    after = _affine(module, inside, inside.computation.root.name, counter[0])
    if start is None or after is None or after[0] != counter[0]:
      continue
    distance, step = limit - counter[1] - start, after[1]
    if step < 0:  # The same loop, upwards.
      distance, step, way = -distance, -step, ways.get(way)
    if step and way in ("LT", "LE"):
      return max(0, -(-(distance + (way == "LE")) // step))
    if step and way == "NE" and distance % step == 0 and distance >= 0:
      return distance // step
  raise ValueError(f"HLO: the trip count of the loop %{loop.name} in %{frame.computation.name} "
                   "is not known: its condition is not a counter compared with a constant")


def _affine(module: Module, frame: Frame, name: str,
            path: _Path) -> tuple[_Path | None, int] | None:
  """A scalar as (slot, offset): an element of the loop's state plus a number.

  The slot of a plain number is None. `path` picks the element where `name` is a tuple.
  Another form: None.
  """
  follow = lambda operand, way: _affine(module, frame, operand, way)
  instruction = frame.computation.instructions[name]
  opcode, operands = instruction.opcode, instruction.operands
  if opcode == "constant":
    try:
      return None, int(instruction.inputs)
    except ValueError:
      return None
  if opcode in _PASS:
    return follow(operands[0], path)
  if opcode == "get-tuple-element":
    return follow(operands[0], (int(instruction.setting("index")),) + path)
  if opcode == "tuple" and path:
    return follow(operands[path[0]], path[1:])
  if opcode == "parameter":
    if frame.loop_body:
      return path, 0
    if frame.caller:
      return _affine(module, frame.caller, frame.arguments[int(instruction.inputs)], path)
  if opcode in ("fusion", "call"):
    callee = module.computations[instruction.callee("calls", "to_apply")]
    return _affine(module, Frame(callee, frame, instruction, operands), callee.root.name, path)
  if opcode == "while" and _unchanged(module, frame, instruction, path):
    return follow(operands[0], path)
  if opcode in ("add", "subtract", "multiply"):
    left, right = follow(operands[0], ()), follow(operands[1], ())
    if opcode == "add" and left and left[0] is None:
      left, right = right, left
    if left is None or right is None or right[0] is not None:
      return None
    if opcode == "multiply":
      return None if left[0] is not None else (None, left[1] * right[1])
    return left[0], left[1] + (right[1] if opcode == "add" else -right[1])
  return None


def _unchanged(module: Module, frame: Frame | None, loop: Instruction, slot: _Path) -> bool:
  """Whether the loop leaves this element of its state as it is."""
  body = module.computations[loop.callee("body")]
  inside = Frame(body, frame, loop, loop.operands, body.name)
  return _affine(module, inside, body.root.name, slot) == (slot, 0)


def _constant(module: Module, frame: Frame, name: str, path: _Path) -> int | None:
  """The number that a scalar is wherever `frame` is entered, or None."""
  value = _affine(module, frame, name, path)
  if value is None or value[0] is None:
    return value and value[1]
  slot, offset = value
  while not frame.loop_body:
    frame = frame.caller
  if not _unchanged(module, frame.caller, frame.call, slot):
    return None
  outer = _constant(module, frame.caller, frame.arguments[0], slot)
  return None if outer is None else outer + offset
