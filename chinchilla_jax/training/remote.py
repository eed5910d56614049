"""Checkpoints in a bucket, where nothing can be renamed.

  checkpoints/
    740.partial   an object; beside 740/ from before its first object until after its last one
    740/          as on a disk

As long as 740.partial is there, 740/ is being written or removed, and is no checkpoint; its removal
is what the folder's renaming is on a disk. Each process writes its part on its own machine, seals
it there, and puts it, its seal last: so every object has a checksum that was taken before it
travelled, and whatever scheme fsspec knows will do. Arrays are Zarr, one object a shard, not OCDBT,
which would have to be merged by a process that sees all parts.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import objects, paths
from chinchilla_jax.storage.paths import Remote
from chinchilla_jax.training import seals

PARTIAL = ".partial"
_ARRAY = ".zarray"


def steps(path: Remote) -> list[int]:
  """Steps of the checkpoints that are complete, ascending. One request."""
  found = objects.entries(path.url)
  unfinished = {name.removesuffix(PARTIAL) for name, _ in found if name.endswith(PARTIAL)}
  return sorted(int(name) for name, folder in found
                if folder and name.isdecimal() and str(int(name)) == name
                and name not in unfinished)


def begin(path: Remote, step: int) -> None:
  """Makes room for a checkpoint; from now until `commit` there is none of this step."""
  objects.write(_mark(path, step), b"")
  objects.delete_all((path / str(step)).url)


def put(folder: pathlib.Path, path: Remote, step: int) -> None:
  """Puts what one process has written and sealed, its seal last.

  Raises:
    OSError: some of it could not be put.
  """
  target = (path / str(step)).url
  names = sorted(paths.sizes(folder), key=lambda name: (name.startswith(f"{seals.FOLDER}/"), name))
  last = [name for name in names if name.startswith(f"{seals.FOLDER}/")]
  for some in (names[:-len(last)], last):
    objects.each(lambda name: objects.upload(folder / name, f"{target}/{name}"), some)


def sealed(path: Remote, step: int, processes: int) -> bool:
  """Whether all processes have put their part."""
  there = paths.names(path / str(step) / seals.FOLDER)
  return {f"{process}.json" for process in range(processes)} <= set(there)


def commit(path: Remote, step: int) -> None:
  """Makes a checkpoint out of what has been put."""
  objects.delete(_mark(path, step))


def remove(path: Remote, step: int) -> None:
  """Removes a checkpoint; cut off anywhere, it is none any more, and `clear` removes the rest."""
  begin(path, step)
  commit(path, step)


def clear(path: Remote) -> None:
  """Removes what is not complete."""
  for name, folder in objects.entries(path.url):
    if name.endswith(PARTIAL) and not folder and name.removesuffix(PARTIAL).isdecimal():
      remove(path, int(name.removesuffix(PARTIAL)))


def set_aside(path: Remote, step: int, target: Remote) -> None:
  """Copies a checkpoint inside the bucket, then removes it: cut off, it is there, perhaps twice."""
  source = (path / str(step)).url
  objects.each(lambda name: objects.copy(f"{source}/{name}", f"{target.url}/{name}"),
               list(objects.sizes(source)))
  remove(path, step)


def _mark(path: Remote, step: int) -> str:
  return (path / f"{step}{PARTIAL}").url


# -------------------------------------------------------------------- Reading arrays


@contextlib.contextmanager
def fetched(where: Remote, wanted: Any = None) -> Iterator[pathlib.Path]:
  """A checkpoint's folder on this machine, without the arrays' contents that are not wanted.

  Args:
    where: the checkpoint.
    wanted: tree of what has a shape and a sharding; None for no contents. Of each array, what
      the devices of this process hold is fetched, and nothing else.

  Raises:
    UserError: an object has changed, is missing, or cannot be reached.
  """
  try:
    sealed_files = seals.files(where)
  except FileNotFoundError as error:
    raise UserError(f"checkpoint {where} has no seal {error.filename}; look at it with `chinchilla "
                    "inspect`") from error
  names = [name for name in sealed_files if name.startswith("state/")]
  folders = {name.removesuffix(_ARRAY) for name in names if name.endswith(f"/{_ARRAY}")}
  contents = {name for name in names if not name.endswith(f"/{_ARRAY}")
              and f"{name.rpartition('/')[0]}/" in folders}
  with paths.Scratch() as folder:
    _fetch(where, folder, [name for name in names if name not in contents], sealed_files)
    if wanted is not None:
      arrays = _by_folder(wanted)
      needed = [name for name in contents if _is_needed(folder, name, arrays)]
      _fetch(where, folder, sorted(needed), sealed_files)
    yield folder


def _fetch(where: Remote, folder: pathlib.Path, names: list[str],
           sealed_files: Mapping[str, Mapping[str, Any]]) -> None:
  def one(name: str) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
      objects.download((where / name).url, target)
    except FileNotFoundError as error:
      raise UserError(f"checkpoint {where}: {name} is missing; look at it with `chinchilla "
                      "inspect`") from error
    with open(target, "rb") as file:
      if hashlib.file_digest(file, "sha256").hexdigest() != sealed_files[name]["sha256"]:
        raise UserError(f"checkpoint {where}: {name} has changed (its checksum is not the seal's); "
                        "look at it with `chinchilla inspect`")
  objects.each(one, names)


def _by_folder(wanted: Any) -> dict[str, Any]:
  """Arrays by the folder that Orbax gives them: "state/params.embedding.table/"."""
  leaves, _ = jax.tree.flatten_with_path(wanted)
  return {f"state/{'.'.join(str(key.key) for key in path)}/": leaf for path, leaf in leaves}


def _is_needed(folder: pathlib.Path, name: str, arrays: Mapping[str, Any]) -> bool:
  """Whether a chunk overlaps what this process's devices hold of its array."""
  place, _, chunk = name.rpartition("/")
  array = arrays.get(f"{place}/")
  if array is None:
    return False
  settings = json.loads((folder / place / _ARRAY).read_text())
  sizes = settings["chunks"]
  if not sizes or array.sharding is None:
    return True
  at = [int(number) for number in chunk.split(settings.get("dimension_separator", "."))]
  return any(all(start < (number + 1) * size and number * size < stop
                 for (start, stop, _), number, size in zip(box, at, sizes, strict=True))
             for box in _boxes(array))


def _boxes(array: Any) -> set[tuple[tuple[int, int, int], ...]]:
  """What each device of this process holds of an array: (start, stop, 1) of every axis."""
  indices = array.sharding.addressable_devices_indices_map(tuple(array.shape)).values()
  return {tuple(one.indices(size) for one, size in zip(index, array.shape, strict=True))
          for index in indices}
