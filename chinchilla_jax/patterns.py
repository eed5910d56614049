"""One pattern matcher (law 6): ordered (regex, value) pairs, the first match wins."""

import re
from collections.abc import Sequence
from typing import Any

import jax


def match_tree(tree: Any, patterns: Sequence[tuple[str, Any]], default: Any) -> Any:
  """The value of the first pattern found in each leaf's path ("blocks/attention/query").

  Args:
    tree: nested dicts.
    patterns: (regular expression, value), searched anywhere in the path.
    default: the value where no pattern is found.

  Returns:
    A tree of the same structure that holds values.
  """
  compiled = [(re.compile(pattern), value) for pattern, value in patterns]

  def value_of(path, _):
    name = "/".join(key.key for key in path)
    return next((value for pattern, value in compiled if pattern.search(name)), default)

  return jax.tree.map_with_path(value_of, tree)
