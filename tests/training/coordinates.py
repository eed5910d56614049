"""The coordinate check (Yang et al. 2022, appendix D.1): how far activations move in a few steps.

A parametrisation transfers a learning rate over a size only if the first steps move every kind of
activation by an amount that does not depend on that size. Real models, real steps, fixed data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import tiny_experiment, with_fields

from chinchilla_jax.model import blockwise, transformer
from chinchilla_jax.training import optimizer, step
from chinchilla_jax.training import state as state_lib

WIDTH, DEPTH = 64, 2  # Of the proxy, where all factors are 1.
STEPS, SEEDS, LR = 3, 2, 2e-3
T, V = 16, 128


def experiment(rule: str, width: int = WIDTH, depth: int = DEPTH, **fields):
  """A model of heads of 16 with d_ff = 2 * d_model; no clipping, since Adam needs none here."""
  return with_fields(tiny_experiment(), **(dict(
      model__parametrisation=rule, model__base_width=WIDTH, model__base_depth=DEPTH,
      model__base_kv_size=16, model__d_model=width, model__n_layers=depth, model__kv_size=16,
      model__n_heads=width // 16, model__d_ff=2 * width, model__vocab_size=V,
      model__remat="none", data__seq_len=T, precision__parameters="float32",
      precision__activations="float32", optimizer__clip_norm=0.0, loss__chunk=0) | fields))


def batch():
  """Text that can be learned: every token has a favourite successor."""
  rng = np.random.default_rng(0)
  successor, tokens = rng.permutation(V), rng.integers(0, V, (8, T + 1))
  for t in range(1, T + 1):
    tokens[:, t] = np.where(rng.random(8) < 0.8, successor[tokens[:, t - 1]], tokens[:, t])
  tokens = tokens.astype(np.int32)
  return {"inputs_bt": tokens[:, :-1], "targets_bt": tokens[:, 1:],
          "segments_bt": np.zeros((8, T), np.int32), "weights_bt": np.ones((8, T), np.float32)}


def activations(model, params, tokens_bt) -> dict[str, jax.Array]:
  """What every block adds up to, the attention scores of every layer, and the logits."""
  module = transformer._module(model, params)
  graph, stack = nnx.split(module.blocks)
  causal = jnp.tril(jnp.ones((T, T)))[None, None]

  def body(x_btd, layer):
    block = nnx.merge(graph, layer)
    heads = block.attention
    q_hbtk, k_hbtk, _ = heads._project(block.attention_norm(x_btd), jnp.arange(T))
    relative = None
    if model.position == "relative":
      relative = (heads.relative_keys(T, x_btd.dtype), *heads._u_v())
    scores_hbts = blockwise.scores(q_hbtk, k_hbtk, relative) / heads.divisor
    x_btd = block(x_btd, None)
    return x_btd, (x_btd, scores_hbts * causal)

  x_btd, (blocks, scores) = jax.lax.scan(body, module.embedding.encode(tokens_bt, "float32"), stack)
  return {"first block": blocks[0], "last block": x_btd, "attention scores": scores,
          "logits": module.embedding.decode(module.final_norm(x_btd))}


def measured(rule: str, width: int = WIDTH, depth: int = DEPTH, **fields):
  """(changes, gradients): root mean squares by kind of activation, and by path of parameter.

  Changes are between initialisation and each of the first steps; gradients are those of the first
  step, of parameters that have any. Geometric means over steps and seeds.
  """
  if (width, depth) == (WIDTH, DEPTH):
    rule = "standard"  # One program for all: test_parametrisation proves that it is.
  return _measured(experiment(rule, width, depth, **fields))


@functools.cache
def _measured(made):
  adamw = optimizer.AdamW(made.optimizer, made.precision, lambda _: LR)
  init = _compiled(lambda key: state_lib.init(made.model, adamw, key), jax.random.key(0))
  first, data = init(jax.random.key(0)), batch()
  see = _compiled(lambda params: activations(made.model, params, data["inputs_bt"]),
                  first["params"])
  train_step = _compiled(step.make_train_step(made, adamw), first, data)
  rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))

  moved, gradients = [], []
  for seed in range(SEEDS):
    state = init(jax.random.key(seed))
    before = see(state["params"])
    for count in range(STEPS):
      state, metrics = train_step(state, data)
      if not count:  # The first moment starts at zero: it is the gradient times 1 - b1.
        gradients.append({"/".join(k.key for k in path): rms(mu) for path, mu in
                          jax.tree.leaves_with_path(state["optimizer"]["mu"])}
                         | {"global norm": float(metrics["grad_norm"])})
      moved.append({name: rms(now - before[name]) for name, now in see(state["params"]).items()})
  return _means(moved), _means(gradients)


def _compiled(function, *args):
  """What runs a few times only need not be fast. LLVM's effort; XLA's passes are the same."""
  return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})


def _means(rows):
  """Geometric means by name, of what is never zero."""
  columns = {name: [row[name] for row in rows] for name in rows[0]}
  return {name: float(np.exp(np.mean(np.log(column))))
          for name, column in columns.items() if all(column)}


def slopes(points: dict[int, dict[str, float]]) -> dict[str, float]:
  """Exponents p of a fit value ~ size**p, by name."""
  sizes = np.log(list(points))
  return {name: float(np.polyfit(sizes, np.log([p[name] for p in points.values()]), 1)[0])
          for name in next(iter(points.values()))}


def over_width(rule, widths, **fields):
  """(slopes of changes, slopes of gradients) over d_model."""
  found = {size: measured(rule, width=size, **fields) for size in widths}
  return tuple(slopes({size: pair[i] for size, pair in found.items()}) for i in range(2))


def over_depth(rule, depths, **fields):
  """(slopes of changes, slopes of gradients) over n_layers."""
  found = {size: measured(rule, depth=size, **fields) for size in depths}
  return tuple(slopes({size: pair[i] for size, pair in found.items()}) for i in range(2))
