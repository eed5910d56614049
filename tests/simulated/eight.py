"""Layouts on eight devices, a tiny model that they can all cut, and one step of it."""

import dataclasses
import functools

import jax
import numpy as np
from tiny import tiny_experiment, with_fields

from chinchilla_jax import config as schema
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import optimizer, step
from chinchilla_jax.training import state as state_lib

# Name to (strategy, axes); data takes the devices that the other axes leave.
LAYOUTS = {
    "replicated data 8": ("replicated", {}),
    "fsdp data 8": ("fsdp", {}),
    "fsdp data 2 x context 4": ("fsdp", dict(context=4)),
    "deepmind data 4 x tensor 2": ("deepmind", dict(tensor=2)),
    "deepmind data 2 x context 2 x tensor 2": ("deepmind", dict(context=2, tensor=2)),
    "fsdp_tensor data 2 x tensor 4": ("fsdp_tensor", dict(tensor=4)),
    "fsdp_tensor data 2 x context 2 x tensor 2": ("fsdp_tensor", dict(context=2, tensor=2)),
    "fsdp_tensor slice 2 x data 2 x tensor 2": ("fsdp_tensor", dict(slice=2, tensor=2)),
}

# A step that runs once need not be fast. LLVM's effort; XLA's passes are the same.
QUICK = {"xla_backend_optimization_level": 0}


def experiment(**fields) -> schema.Experiment:
  """A tiny experiment whose smallest weights are cut too, in float32 unless fields say so.

  Adam divides by |gradient| + eps. With the usual eps an update where the gradient is all but
  zero is the sign of a rounding error, which no two summation orders agree about.
  """
  return with_fields(tiny_experiment(), **(dict(
      model__n_heads=4, model__kv_size=8, batch__sequences=8,
      precision__parameters="float32", precision__activations="float32", loss__chunk=32,
      optimizer__eps=1e-3, mesh__whole_below=0) | fields))


def on(name: str, base: schema.Experiment) -> schema.Experiment:
  """The experiment in one of `LAYOUTS`, with two rounds of attention on each device."""
  strategy, axes = LAYOUTS[name]
  block = base.data.seq_len // axes.get("context", 1) // 2
  return with_fields(base, mesh__strategy=strategy, model__attention_block=block,
                     **{f"mesh__{axis}": size for axis, size in axes.items()})


def layout_of(name: str, base: schema.Experiment) -> Layout:
  placed = on(name, base)
  return Layout(placed, mesh.make(placed.mesh))


def batch_of(base: schema.Experiment, seed: int = 0) -> dict[str, np.ndarray]:
  """Several documents a sequence; targets that do not count, another number in every sequence."""
  rng = np.random.default_rng(seed)
  b, t = base.batch.sequences, base.data.seq_len
  tokens = rng.integers(0, base.model.vocab_size, (b, t + 1)).astype(np.int32)
  weights = (rng.random((b, t)) < np.linspace(0.3, 1.0, b)[:, None]).astype(np.float32)
  return {"inputs_bt": tokens[:, :-1], "targets_bt": tokens[:, 1:],
          "segments_bt": np.cumsum(rng.random((b, t)) < 0.1, axis=1, dtype=np.int32),
          "weights_bt": weights}


class _Telling(optimizer.AdamW):
  """AdamW that hands out the gradients it was given, as one more metric."""

  def propose(self, sums, share, *arguments):
    norms, take = super().propose(sums, share, *arguments)
    return norms | {"grads": jax.tree.map(lambda g: g.astype("float32") * share, sums)}, take


def adamw_of(base: schema.Experiment, kind=optimizer.AdamW) -> optimizer.AdamW:
  return kind(base.optimizer, base.precision, lambda _: 1e-2)


def init_of(base: schema.Experiment, layout: Layout | None = None):
  """A fresh state, drawn where it lies."""
  adamw = adamw_of(base)
  shardings = layout and layout.state(state_lib.abstract(base.model, adamw))
  init = functools.partial(state_lib.init, base.model, adamw)
  return jax.jit(init, out_shardings=shardings)(jax.random.key(base.seed))


@functools.cache
def fresh(base: schema.Experiment):
  """A state of one device, none of whose arrays is all zeros or all ones: errors would not show."""
  state, rng = jax.device_get(init_of(base)), np.random.default_rng(1)
  noise = lambda w: (w + rng.normal(0, 0.02, w.shape)).astype(w.dtype)
  if "master" in state["optimizer"]:
    state["optimizer"]["master"] = jax.tree.map(noise, state["optimizer"]["master"])
    state["params"] = jax.tree.map(lambda w, p: w.astype(p.dtype), state["optimizer"]["master"],
                                   state["params"])
  else:
    state["params"] = jax.tree.map(noise, state["params"])
  return state


@dataclasses.dataclass(frozen=True)
class Stepped:
  """After one step, on the host. `state` and `grads` are {path: array}."""

  state: dict[str, np.ndarray]
  grads: dict[str, np.ndarray]
  metrics: dict[str, np.ndarray]


@functools.cache
def one_step(base: schema.Experiment, name: str = "") -> Stepped:
  """One step in one of `LAYOUTS`; by default on one device and without a layout."""
  layout = layout_of(name, base) if name else None
  adamw = adamw_of(base, _Telling)
  placed = on(name, base) if name else base
  train_step = jax.jit(step.make_train_step(placed, adamw, layout), compiler_options=QUICK)
  state = fresh(base)
  state, metrics = train_step(
      jax.device_put(state, layout and layout.state(state)),
      jax.device_put(batch_of(base), layout and layout.rows))
  state, metrics = jax.device_get((state, metrics))
  return Stepped(flat(state), flat(metrics.pop("grads")), metrics)


def flat(tree) -> dict[str, np.ndarray]:
  return {"/".join(key.key for key in path): leaf
          for path, leaf in jax.tree.leaves_with_path(tree)}
