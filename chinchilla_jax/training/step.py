"""The training step and the evaluation step: pure functions that lower without devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.model import parametrisation, transformer
from chinchilla_jax.model.placement import WHOLE, Placement, Rows
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import loss, spikes
from chinchilla_jax.training.optimizer import AdamW
from chinchilla_jax.training.state import State

Batch = dict[str, jax.Array]  # inputs_bt, targets_bt, segments_bt: int32; weights_bt: float32.


def loss_sums(experiment: schema.Experiment, params: Any, batch: Batch,
              placement: Placement = WHOLE):
  """(objective, nll): weighted sums over the targets of a batch, in nats, float32."""
  rows = Rows.of(batch["inputs_bt"].shape[1], placement.shards("length"),
                 experiment.model.attention_block)
  if not experiment.data.document_mask:  # All zeros; kernels ask for nothing, or do without.
    batch = batch | {"segments_bt": None}
  batch = {name: a if a is None else placement.constrain(rows.deal(a, axis=1), ("batch", "length"))
           for name, a in batch.items()}
  x_btd = transformer.hidden(experiment.model, params, batch["inputs_bt"], batch["segments_bt"],
                             jnp.dtype(experiment.precision.activations), placement)
  # The loss has the whole table on every device, and leaves its whole gradient in float32. Neither
  # lies beside the layers: gathered once more after them, scattered before their backward pass.
  x_btd, embedding = placement.first(x_btd, params["embedding"])
  embedding = placement.weights("embedding", embedding)
  return loss.cross_entropy(
      x_btd, embedding["table"], embedding.get("logit_bias"), batch["targets_bt"],
      batch["weights_bt"], experiment.loss.z_loss, experiment.loss.chunk, placement)


def gradient_sums(experiment: schema.Experiment, params: Any, batch: Batch,
                  layout: Layout | None = None):
  """Gradient of the summed loss over a batch, summed over microbatches.

  Every microbatch contributes the gradient of its *sum*; whoever wants that of the mean divides
  once by the weight of the whole batch, so ragged masks cannot weigh microbatches unequally
  (law 3).

  Args:
    experiment: model, precision, loss, and how many microbatches a batch of this size has.
    params: in the dtype of the parameters.
    batch: [B, T] arrays.
    layout: over devices; gradients then lie as the optimizer's state does.

  Returns:
    (grads, nll, weight): gradients in the handed-over dtype (float32 if accumulated),
    sum of nll in nats, sum of the targets' weights.
  """
  if experiment.precision.gradients == "float32":
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  placement = WHOLE if layout is None else layout.placement
  settle = (lambda grads: grads) if layout is None else layout.like_optimizer
  grad_fn = jax.value_and_grad(
      lambda p, part: loss_sums(experiment, p, part, placement), has_aux=True)
  weight = jnp.sum(batch["weights_bt"])
  count = durations.microbatches(experiment.batch, batch["inputs_bt"].shape[0])
  if count == 1:
    (_, nll), grads = grad_fn(params, batch)
  else:
    def accumulate(carry, part):
      grads, nll = carry
      (_, part_nll), part_grads = grad_fn(params, part)
      grads = jax.tree.map(lambda g, p: g + p.astype(jnp.float32), grads, settle(part_grads))
      return (settle(grads), nll + part_nll), None

    zeros = settle(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    # Every count-th sequence: a microbatch then has as many of each device as the batch has.
    parts = jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), batch)
    (grads, nll), _ = jax.lax.scan(accumulate, (zeros, jnp.float32(0)), parts)
  return settle(grads), nll, weight


def gradients(experiment: schema.Experiment, params: Any, batch: Batch,
              layout: Layout | None = None):
  """(grads, nll, weight) as of `gradient_sums`, but the gradients those of the mean, float32."""
  sums, nll, weight = gradient_sums(experiment, params, batch, layout)
  share = 1.0 / jnp.maximum(weight, 1.0)
  return jax.tree.map(lambda g: g.astype(jnp.float32) * share, sums), nll, weight


def make_train_step(experiment: schema.Experiment, optimizer: AdamW, layout: Layout | None = None,
                    ) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """The step of one experiment: (state, batch) -> (state, metrics).

  Metrics are float32 scalars: `loss` (nats per token), `grad_norm`, `param_norm`,
  `update_norm`, `learning_rate`, `targets` (weight of the batch), `spike` (1 where this step is
  one), and the guard's `nonfinite_run`, `nonfinite_total` and `spike_total`.

  With a layout, state and batch lie on its mesh: jit it with the shardings of `Layout.state`.

  A non-finite loss, gradient or update leaves parameters and optimizer as they were; the guard
  counts it. So does a spike where `guard.spikes` is skip, under its own count; the learning rate
  goes on. Else a spike's update is applied: what follows from it is the host's business.
  """
  root = jax.random.key(experiment.seed)

  def train_step(state: State, batch: Batch):
    sums, nll, weight = gradient_sums(experiment, state["params"], batch, layout)
    share = 1.0 / jnp.maximum(weight, 1.0)
    key = jax.random.fold_in(root, state["step"])
    norms, take = optimizer.propose(
        sums, share, state["optimizer"], state["params"], state["step"], key,
        parametrisation.groups(experiment.model))
    mean = nll / jnp.maximum(weight, 1.0)
    said = (nll, norms["grad_norm"], norms["update_norm"], norms["param_norm"])
    finite = jnp.all(jnp.isfinite(jnp.stack(said)))
    guard = state["guard"]
    stats, is_spike = spikes.judge(
        experiment.guard, guard, jnp.where(finite, mean, jnp.nan), norms["update_norm"],
        norms["learning_rate"])
    params, optimizer_state = take(
        finite & ~is_spike if experiment.guard.spikes == "skip" else finite)
    if layout is not None:  # What is gathered has the dtype of the parameters, not the master's.
      params = layout.like_optimizer(params)
    counts = {"nonfinite_run": jnp.where(finite, 0, guard["nonfinite_run"] + 1),
              "nonfinite_total": guard["nonfinite_total"] + jnp.where(finite, 0, 1),
              "spike_total": guard["spike_total"] + jnp.where(is_spike, 1, 0)}
    new_state = {
        "step": state["step"] + 1,
        "params": params,
        "optimizer": optimizer_state,
        "guard": counts | stats,
    }
    metrics = {"loss": mean, "targets": weight, **norms, **counts,
               "spike": is_spike.astype(jnp.float32)}
    return new_state, metrics

  return train_step


def make_eval_step(experiment: schema.Experiment,
                   layout: Layout | None = None) -> Callable[..., dict[str, jax.Array]]:
  """(params, batch, piece_bytes_v) -> sums over the batch: `nll`, `targets`, `bytes`."""
  placement = WHOLE if layout is None else layout.placement

  def eval_step(params: Any, batch: Batch, piece_bytes_v: jax.Array):
    _, nll = loss_sums(experiment, params, batch, placement)
    bytes_bt = piece_bytes_v[batch["targets_bt"]].astype(jnp.float32) * batch["weights_bt"]
    return {"nll": nll, "targets": jnp.sum(batch["weights_bt"]), "bytes": jnp.sum(bytes_bt)}

  return eval_step
