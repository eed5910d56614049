"""A training step on one GPU, ours beside nanoGPT compiled with flash attention, in turn:

  python benchmarks/gpu_step.py [--shapes 417m 1.4b] [--nanogpt FOLDER --torch-python PYTHON]

bfloat16, sequences of 2,048. Prints tokens/s and model FLOP utilisation: products with weights and
attention over visible pairs, forward and backward (6ND + causal attention), of the GPU's dense
bfloat16 peak. nanoGPT runs from a checkout, in a Python that has torch; without --nanogpt it is
left out. Bars: 50 % for rotary and 45 % for relative positions, and nanoGPT in the same run.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import step_driver

from chinchilla_jax.errors import UserError, as_script, positive

DRIVER = pathlib.Path(__file__).with_name("step_driver.py")

NANOGPT = """
import json, os, sys, time
events = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # What it prints itself.
sys.path.insert(0, {folder!r})
import numpy as np, torch
from model import GPT, GPTConfig
shape, device = {shape!r}, "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_tf32 = True
net = GPT(GPTConfig(block_size=shape["seq"], vocab_size=shape["vocab"], n_layer=shape["n_layers"],
                    n_head=shape["n_heads"], n_embd=shape["d_model"], dropout=0.0, bias=False))
net = net.to(device)
adamw = net.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
compiled = torch.compile(net)
rng = np.random.default_rng(0)
def step():
  tokens = torch.from_numpy(rng.integers(0, shape["vocab"], (shape["batch"], shape["seq"] + 1)))
  tokens = tokens.to(device)
  with torch.autocast(device, torch.bfloat16):
    _, loss = compiled(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
  loss.backward()
  torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
  adamw.step()
  adamw.zero_grad(set_to_none=True)
  return float(loss.detach())
step()
print(json.dumps(dict(event="ready")), file=events)
for line in sys.stdin:
  if line.strip() == "quit":
    break
  start = time.perf_counter()
  loss = step()
  print(json.dumps(dict(event="step", dt=time.perf_counter() - start, loss=loss)), file=events)
"""


class Contestant:
  """A process that takes a step when it is asked to."""

  def __init__(self, name: str, command: list[str]):
    self.name, self.seconds = name, []
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     text=True)
    self.facts = self._event()

  def step(self) -> None:
    self._process.stdin.write("step\n")
    self._process.stdin.flush()
    self.seconds.append(self._event()["dt"])

  def quit(self) -> None:
    self._process.communicate("quit\n")

  def _event(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      raise UserError(f"{self.name} ended early; its words are above")
    return json.loads(line)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--shapes", nargs="+", default=["417m", "1.4b"],
                      choices=sorted(step_driver.SHAPES))
  parser.add_argument("--batch", type=positive, help="sequences; those of the shape by default")
  parser.add_argument("--steps", type=positive, default=20)
  parser.add_argument("--nanogpt", metavar="FOLDER", help="a checkout of karpathy/nanoGPT")
  parser.add_argument("--torch-python", default=sys.executable)
  args = parser.parse_args()
  if args.nanogpt and not (pathlib.Path(args.nanogpt) / "model.py").is_file():
    raise UserError(f"--nanogpt: {args.nanogpt} is no checkout of nanoGPT (it has no model.py)")
  for name in args.shapes:
    shape = step_driver.SHAPES[name] | ({"batch": args.batch} if args.batch else {})
    ours = [sys.executable, str(DRIVER), "--serve", "--shape", name, "--dtype", "bf16",
            "--batch", str(shape["batch"])]
    # One after the other: several of them do not fit into memory while they compile.
    runs = [Contestant(position, [*ours, "--position", position])
            for position in ("rotary", "relative")]
    if args.nanogpt:
      program = NANOGPT.format(folder=args.nanogpt, shape=shape)
      runs.append(Contestant("nanoGPT", [args.torch_python, "-c", program]))
    for turn in range(3 + args.steps):
      for run in runs[::1 if turn % 2 else -1]:
        run.step()
    tokens, first = shape["batch"] * shape["seq"], runs[0].facts
    print(f"{name} on {first['device']}, jax {first['versions']['jax']}, {shape['batch']} x "
          f"{shape['seq']} tokens a step, {args.steps} steps each, in turn")
    for run in runs:
      run.quit()
      seconds = run.seconds[3:]
      rate = tokens / statistics.median(seconds)
      # nanoGPT has the products of the rotary form; its positions are a table.
      per_token = run.facts.get("flops_causal", first["flops_causal"])
      share = f"{rate * per_token / first['peak_flops']:.1%}" if first["peak_flops"] else "unknown"
      print(f"  {run.name:9} {rate:12,.0f} tokens/s [{tokens / max(seconds):,.0f} - "
            f"{tokens / min(seconds):,.0f}]   MFU {share}   {run.facts.get('attention', '')}")


if __name__ == "__main__":
  as_script(main)
