"""The sharding report: where every array of a config's train state lies on a mesh, in bytes.

`facts` works it out from shapes alone, so neither devices nor memory are needed, and gives plain
data (JSON); `text` writes the same facts as tables of at most 120 columns.

Conventions:
  cut: the mesh axes of each axis of an array; '-' for whole. "80 x (8192, 64)" is 80 layers,
    stacked on a leading axis, which is not cut unless it is said ("data x (-, tensor)").
  bytes: of one copy. bytes_per_device: what one device holds of it. replicated_bytes: what all
    devices together hold beyond the first copy.
"""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh

from chinchilla_jax import config as schema
from chinchilla_jax import durations, patterns
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.parallel import mesh as mesh_lib
from chinchilla_jax.parallel import rules
from chinchilla_jax.parallel.layout import Entry, Layout, refuse

Facts = dict[str, Any]
COLUMNS = 120
_MOMENTS = ("mu", "nu")


def abstract_mesh(config: schema.Mesh, n_devices: int, n_slices: int = 1) -> AbstractMesh:
  """The mesh of a config over devices that are not here.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  sizes = mesh_lib.sizes(config, n_devices, n_slices)
  return AbstractMesh(tuple(sizes.values()), mesh_lib.AXES,
                      axis_types=(AxisType.Auto,) * len(mesh_lib.AXES))


# -------------------------------------------------------------------- Facts


def facts(experiment: schema.Experiment, mesh: Mesh | AbstractMesh, state: Any, *,
          devices: str = "", memory: int | None = None) -> Facts:
  """Everything that the report says.

  Args:
    experiment: the config.
    mesh: of real devices, or from `abstract_mesh`.
    state: the abstract train state (`training.state.abstract`).
    devices: what the devices are, such as "v4:8x8x16"; empty: not known.
    memory: bytes of memory of one device, if known.

  Returns:
    A dict of plain data. `does_not_train` says why `train` would refuse, or is None.

  Raises:
    UserError: an override that cannot be kept, so that there is no layout to report.
  """
  sizes = dict(mesh.shape)
  entries = Layout(experiment, mesh).entries(state)
  arrays, others = _arrays(entries, sizes)
  activations = _activations(experiment, sizes)
  overrides = _overrides(experiment.mesh.overrides, [entry.path for entry in entries])
  groups = shapes.parameter_groups(experiment.model)
  in_table = sum(math.prod(array["shape"]) for array in arrays)
  totals = _totals(arrays, others, math.prod(sizes.values()))
  held = totals["state"]["bytes_per_device"]
  return {
      "name": experiment.name,
      "mesh": {"axes": sizes, "devices": math.prod(sizes.values()), "kind": devices or None,
               "memory_per_device": memory, "state_share": held / memory if memory else None},
      "strategy": {"name": experiment.mesh.strategy,
                   "why": rules.STRATEGIES[experiment.mesh.strategy].why},
      "arrays": arrays,
      "others": others,
      "totals": totals,
      "parameters": {"groups": groups, "total": sum(groups.values()), "in_table": in_table},
      "batch": _batch(experiment, sizes),
      "activations": activations,
      "loss_chunk": experiment.loss.chunk,
      "fell_back": _fell_back(entries, activations),
      "overrides": overrides,
      "notes": [*_override_notes(overrides), *_count_notes(sum(groups.values()), in_table),
                *_whole_notes(experiment, mesh, state, entries)],
      "does_not_train": _refusal(experiment, sizes),
  }


def _arrays(entries: Iterable[Entry], sizes: Mapping[str, int]) -> tuple[list[Facts], list[Facts]]:
  """One row a parameter, with its optimizer state; and what belongs to no parameter."""
  rows: dict[str, Facts] = {}
  state: dict[str, list[tuple[str, Entry]]] = {}
  others = []
  for entry in entries:
    kind, _, rest = entry.path.partition("/")
    if kind == "params":
      rows[rest] = {"path": rest, "axes": list(entry.names), "shape": list(entry.shape),
                    "parameter": _held(["params"], [entry], sizes), "optimizer": []}
      continue
    name, _, of = rest.partition("/")
    if kind == "optimizer" and of:
      state.setdefault(of, []).append((name, entry))
    else:
      others.append({"path": entry.path, "shape": list(entry.shape)}
                    | _held([entry.path], [entry], sizes))
  for path, row in rows.items():
    alike: dict[Any, list[tuple[str, Entry]]] = {}  # One spec, but for overrides.
    for name, entry in state.get(path, ()):
      alike.setdefault((str(entry.dtype), entry.resolved.spec), []).append((name, entry))
    row["optimizer"] = [_held([name for name, _ in group], [entry for _, entry in group], sizes)
                        for group in alike.values()]
  return list(rows.values()), others


def _held(names: list[str], entries: Sequence[Entry], sizes: Mapping[str, int]) -> Facts:
  """Of arrays that have one shape, dtype and spec: all of them together."""
  first = entries[0]
  whole = sum(entry.bytes for entry in entries)
  each = sum(entry.bytes_per_device(sizes) for entry in entries)
  return {"arrays": names, "dtype": str(first.dtype),
          "cut": _cut(first.resolved.spec, len(first.shape)), "bytes": whole,
          "bytes_per_device": each,
          "replicated_bytes": each * math.prod(sizes.values()) - whole}


def _cut(spec: Any, rank: int) -> list[list[str]]:
  """Mesh axes of every axis of an array."""
  axes = [list(names) for names in rules.axes_of(spec)]
  return axes + [[] for _ in range(rank - len(axes))]


def _totals(arrays: list[Facts], others: list[Facts], n_devices: int) -> dict[str, Facts]:
  groups: dict[str, list[Facts]] = {"parameters": [], "master": [], "moments": []}
  for array in arrays:
    groups["parameters"].append(array["parameter"])
    for held in array["optimizer"]:
      for name in held["arrays"]:  # They share the bytes equally: one shape and dtype.
        part = {key: held[key] // len(held["arrays"]) for key in ("bytes", "bytes_per_device")}
        groups["moments" if name in _MOMENTS else name].append(held | part)
  groups["counters"] = others
  groups["state"] = [held for group in groups.values() for held in group]
  totals = {}
  for name, group in groups.items():
    whole = sum(held["bytes"] for held in group)
    each = sum(held["bytes_per_device"] for held in group)
    totals[name] = {"dtypes": sorted({held["dtype"] for held in group}), "bytes": whole,
                    "bytes_per_device": each, "bytes_on_all_devices": each * n_devices,
                    "replicated_bytes": each * n_devices - whole}
  return totals


def _batch(experiment: schema.Experiment, sizes: Mapping[str, int]) -> list[Facts]:
  """One row a stage of the batch's ramp. `per_device` is None where it does not divide."""
  batch, over = experiment.batch, sizes["slice"] * sizes["data"]
  rows = []
  for begins, count in (("0%", batch.sequences), *batch.ramp):
    parts = durations.microbatches(batch, count)
    per_device = None if count % (parts * over) else count // (parts * over)
    rows.append({"from": begins, "sequences": count, "microbatches": parts,
                 "per_device": per_device})
  return rows


def _activations(experiment: schema.Experiment, sizes: Mapping[str, int]) -> list[Facts]:
  """How the arrays of one microbatch lie: those that the model asks a layout for."""
  model, batch, t = experiment.model, experiment.batch, experiment.data.seq_len
  size = {"batch": batch.sequences // durations.microbatches(batch, batch.sequences),
          "length": t, "residual": t, "keys": t, "embed": model.d_model, "heads": model.n_heads,
          "head_dim": model.kv_size, "mlp": model.d_ff, "vocab": model.vocab_size}
  rows = []
  for name, axes in (("tokens", ("batch", "length")),
                     ("between layers", ("batch", "residual", "embed")),
                     ("into a layer", ("batch", "length", "embed")),
                     ("queries", ("heads", "batch", "length", "head_dim")),
                     ("keys, values", ("heads", "batch", "keys", "head_dim")),
                     ("feed-forward", ("batch", "length", "mlp")),
                     ("logits", ("batch", "length", "vocab"))):
    shape = [size[axis] for axis in axes]
    resolved = rules.resolve(shape, axes, rules.ACTIVATIONS, sizes)
    cut = _cut(resolved.spec, len(shape))
    each = [n // math.prod(sizes[axis] for axis in by) for n, by in zip(shape, cut, strict=True)]
    rows.append({"name": name, "axes": list(axes), "shape": shape, "cut": cut,
                 "shape_per_device": each, "fell_back": list(resolved.fell_back)})
  return rows


def _fell_back(entries: Iterable[Entry], activations: Iterable[Facts]) -> list[Facts]:
  """Rules that could not be kept: the reason, and the arrays."""
  found: dict[str, list[str]] = {}
  for entry in entries:
    for reason in entry.resolved.fell_back:
      found.setdefault(reason, []).append(entry.path)
  for row in activations:
    for reason in row["fell_back"]:
      found.setdefault(reason, []).append(f"activations/{row['name']}")
  return [{"reason": reason, "arrays": paths} for reason, paths in found.items()]


def _overrides(overrides: Sequence[tuple[str, str]], paths: Sequence[str]) -> list[Facts]:
  """Which arrays each override cuts. `hidden`: those that an earlier one has taken."""
  numbered = [(pattern, index) for index, (pattern, _) in enumerate(overrides)]
  first = {path: patterns.match(path, numbered, None) for path in paths}
  rows = []
  for index, (pattern, spec) in enumerate(overrides):
    found = [path for path in paths if patterns.match(path, [(pattern, True)], False)]
    rows.append({"pattern": pattern, "cut": spec,
                 "arrays": [path for path in found if spec and first[path] == index],
                 "hidden": [path for path in found if first[path] != index]})
  return rows


def _override_notes(overrides: Iterable[Facts]) -> Iterator[str]:
  for row in overrides:
    if row["arrays"]:
      continue
    why = ("has an empty sharding, so the rules decide" if not row["cut"] else
           "comes after others that match all of its arrays" if row["hidden"] else
           "matches no array of the train state")
    yield f"config.mesh.overrides: {row['pattern']!r} {why}"


def _count_notes(by_rule: int, in_table: int) -> Iterator[str]:
  if by_rule != in_table:
    yield (f"the arrays have {in_table:,} parameters, the rule of Table A9 says {by_rule:,}: "
           f"{in_table - by_rule:+,}")


def _whole_notes(experiment: schema.Experiment, mesh: Any, state: Any,
                 entries: Sequence[Entry]) -> Iterator[str]:
  limit = experiment.mesh.whole_below
  eager = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, whole_below=0))
  cut = Layout(eager, mesh).entries(state)
  small = sum(a.resolved.spec != b.resolved.spec for a, b in zip(entries, cut, strict=True))
  if small:
    arrays = "1 array is" if small == 1 else f"{small} arrays are"
    yield (f"{arrays} not cut over data or context, having fewer than {limit:,} elements a layer "
           "(config.mesh.whole_below)")


def _refusal(experiment: schema.Experiment, sizes: Mapping[str, int]) -> str | None:
  try:
    refuse(experiment, sizes)
  except UserError as error:
    return str(error)
  return None


# -------------------------------------------------------------------- Text


def text(report: Facts) -> str:
  """The report as tables; what `facts` returned, and nothing else."""
  parts = (_head, _array_table, _total_table, _count_table, _activation_table, _findings)
  return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part(report))))


def _head(report: Facts) -> Iterator[str]:
  mesh, strategy = report["mesh"], report["strategy"]
  axes = " x ".join(f"{name} {size}" for name, size in mesh["axes"].items())
  kind = f" ({mesh['kind']})" if mesh["kind"] else ""
  yield (f"{report['name']}: {report['parameters']['total']:,} parameters, embedding included "
         "(rule of Table A9)")
  yield f"mesh: {axes} = {mesh['devices']:,} device{'s' * (mesh['devices'] > 1)}{kind}"
  yield from _wrapped(f"strategy {strategy['name']}: {strategy['why']}")


def _array_table(report: Facts) -> Iterator[str]:
  rows: list[tuple[str, ...]] = [
      ("array", "shape, logical axes", "held as", "cut over", "per device", "copies")]
  folder = None
  for array in report["arrays"]:
    here, _, name = array["path"].rpartition("/")
    if here != folder:
      folder = here
      rows.append((here,))
    stacked = array["axes"][:1] == ["layers"]
    axes = array["axes"][1:] if stacked else array["axes"]
    first, *rest = array["optimizer"] or [None]
    rows.append((f"  {name}", _shape(array["shape"], stacked), *_held_cells(array["parameter"],
                                                                            stacked)))
    under = _held_cells(first, stacked) if first else ()
    rows.append(("", ", ".join(axis or "-" for axis in axes), *under))
    rows += [("", "", *_held_cells(held, stacked)) for held in rest]
  yield ("Where the train state lies: each parameter, and under it its optimizer state "
         "(copies: bytes beyond the first, in all)")
  yield from _aligned(rows, right=(4, 5))


def _held_cells(held: Facts, stacked: bool) -> tuple[str, ...]:
  names = held["arrays"]
  many = "" if names == ["params"] else f" {'+'.join(names)}"
  return (f"{held['dtype']}{many}", _cut_text(held["cut"], stacked),
          bytes_text(held["bytes_per_device"]), bytes_text(held["replicated_bytes"]))


def _total_table(report: Facts) -> Iterator[str]:
  rows = [("bytes of", "", "one copy", "per device", "all devices", "copies", "")]
  for name, total in report["totals"].items():
    if not total["bytes"]:
      continue
    share = total["replicated_bytes"] / total["bytes_on_all_devices"]
    label = "the train state" if name == "state" else name
    rows.append((label, "" if name == "state" else ", ".join(total["dtypes"]),
                 *(bytes_text(total[key]) for key in (
                     "bytes", "bytes_per_device", "bytes_on_all_devices", "replicated_bytes")),
                 f"{share:.1%}"))
  yield from _aligned(rows, right=(2, 3, 4, 5, 6))
  mesh = report["mesh"]
  if mesh["memory_per_device"]:
    yield (f"The train state takes {mesh['state_share']:.1%} of a device's "
           f"{bytes_text(mesh['memory_per_device'])} ({mesh['kind']}).")
  yield "Gradients and activations are not in it: `chinchilla compile` counts them."


def _count_table(report: Facts) -> Iterator[str]:
  counts = report["parameters"]
  rows = [("parameters", "number", "share")]
  rows += [(group, f"{n:,}", f"{n / counts['total']:.2%}") for group, n in counts["groups"].items()]
  rows.append(("total by the rule", f"{counts['total']:,}", ""))
  equal = "equal" if counts["in_table"] == counts["total"] else "not equal"
  rows.append(("sum over the arrays", f"{counts['in_table']:,}", equal))
  yield from _aligned(rows, right=(1, 2))


def _activation_table(report: Facts) -> Iterator[str]:
  for stage, row in enumerate(report["batch"]):
    parts, each = row["microbatches"], row["per_device"]
    begin = f"from {row['from']} on:" if stage else "batch:"
    yield (f"{begin} {row['sequences']:,} sequences in {parts:,} microbatch{'es' * (parts > 1)}, "
           + ("which do not divide among the devices" if each is None
              else f"{each:,} at a time on a device"))
  rows = [("activations", "of the first microbatch", "cut over", "on a device")]
  for row in report["activations"]:
    named = ", ".join(f"{axis} {n}" for axis, n in zip(row["axes"], row["shape"], strict=True))
    rows.append((row["name"], named, _cut_text(row["cut"]), _shape(row["shape_per_device"])))
  yield from _aligned(rows)
  if report["loss_chunk"]:
    yield (f"Of the logits, a device holds about {report['loss_chunk']:,} tokens at once "
           "(config.loss.chunk).")


def _findings(report: Facts) -> Iterator[str]:
  for row in report["fell_back"]:
    names = dict.fromkeys(_short(path) for path in row["arrays"])
    yield from _wrapped(f"fell back: {row['reason']}; in {', '.join(names)}")
  for row in report["overrides"]:
    if row["arrays"]:
      yield from _wrapped(f"override: {row['pattern']!r} cuts by {row['cut']!r}: "
                          f"{', '.join(row['arrays'])}")
  for note in report["notes"]:
    yield from _wrapped(f"note: {note}")


def _short(path: str) -> str:
  kind, _, rest = path.partition("/")
  return f"optimizer/*/{rest.partition('/')[2]}" if kind == "optimizer" else path


def _shape(shape: Sequence[int], stacked: bool = False) -> str:
  if stacked:
    return f"{shape[0]} x {_shape(shape[1:])}"
  return f"({', '.join(map(str, shape))})"


def _cut_text(cut: Sequence[Sequence[str]], stacked: bool = False) -> str:
  words = ["+".join(axes) or "-" for axes in cut]
  if stacked and words[0] == "-":
    words = words[1:]
  elif stacked:
    return f"{words[0]} x ({', '.join(words[1:])})"
  return f"({', '.join(words)})"


def bytes_text(n: int) -> str:
  """Bytes in units of 1024: "1.50 GiB"."""
  for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
    if n >= 1024**power:
      return f"{n / 1024**power:,.2f} {unit}"
  return f"{n} B" if n else "0"


def _aligned(rows: Sequence[tuple[str, ...]], right: Sequence[int] = ()) -> Iterator[str]:
  """Rows in columns under the first one. A row of one cell is a heading, as wide as it is."""
  full = [row for row in rows if len(row) > 1]
  widths = [max(len(row[i]) if i < len(row) else 0 for row in full) for i in range(len(rows[0]))]
  for row in rows:
    cells = row if len(row) == 1 else [
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=False))]
    yield f"  {'  '.join(cells)}".rstrip()


def _wrapped(line: str) -> list[str]:
  return textwrap.wrap(line, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
