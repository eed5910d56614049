"""One pattern matcher (law 6): ordered (regex, value) pairs, the first match wins."""

import re
from collections.abc import Sequence
from typing import Any

import jax


def match(path: str, patterns: Sequence[tuple[str, Any]], default: Any) -> Any:
  """The value of the first pattern found anywhere in a path ("blocks/attention/w_query")."""
  return next((value for pattern, value in patterns if re.search(pattern, path)), default)


def match_tree(tree: Any, patterns: Sequence[tuple[str, Any]], default: Any) -> Any:
  """`match` for the path of each leaf.

  Args:
    tree: nested dicts.
    patterns: (regular expression, value).
    default: the value where no pattern is found.

  Returns:
    A tree of the same structure that holds values.
  """
  return jax.tree.map_with_path(
      lambda path, _: match("/".join(key.key for key in path), patterns, default), tree)
