"""Stand-ins for gcloud and for what a TPU VM has (sudo, systemctl, uv ...), which record.

`gcloud ... ssh --command` runs the command in a shell, once for each machine of a slice, each
with a home folder of its own: what is tested there is the real thing, but for the machine.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess

from tiny import ROOT

_GCLOUD = r'''#!{python}
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
argv = sys.argv[1:]
with open(cloud / "calls", "a") as file:
  file.write(json.dumps(argv) + "\n")
line = " ".join(argv)
answers = json.loads((cloud / "answers.json").read_text())
for answer in answers:
  if answer["to"] in line and answer["times"] > 0:
    answer["times"] -= 1
    (cloud / "answers.json").write_text(json.dumps(answers))
    print(answer["out"])
    print(answer["err"], file=sys.stderr)
    sys.exit(answer["status"])
homes = sorted((cloud / "machines").iterdir()) if (cloud / "machines").exists() else []
if " scp " in line:
  for home in homes:
    shutil.copy(argv[argv.index("scp") + 1], home)
elif " ssh " in line:
  command = next(word for word in argv if word.startswith("--command="))[len("--command="):]
  for home in homes:
    done = subprocess.run(["bash", "-c", command], cwd=home, env={
        "HOME": str(home), "PATH": str(cloud / "vm") + ":/usr/bin:/bin", "USER": "someone",
        "FAKE_CLOUD": str(cloud)})
    if done.returncode:
      sys.exit(done.returncode)
elif "secrets versions access" in line:
  print((cloud / "secret").read_text(), end="")
elif " describe " in line and "queued-resources" in line:
  states = (cloud / "states").read_text().split()
  if not states:
    sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource")
  print(states[0])
  (cloud / "states").write_text(" ".join(states[1:] or states))
elif "queued-resources create" in line:
  (cloud / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif "accelerator-types list" in line:
  print("v4-8\nv5litepod-16\nv4-2048\nv6e-8")
elif "buckets describe" in line:
  print("the-bucket")
'''

# What would change the machine is written down. The tests may run as root, so `sudo` runs nothing
# but these stand-ins, and what it is to write with tee lies in the home folder.
_VM = {
    "sudo": r"""case $1 in
  tee) shift; [ "$1" != -a ] || shift
       mkdir -p "$HOME/system-files$(dirname "$1")" && cat >> "$HOME/system-files$1" ;;
  systemctl) "$(dirname "$0")/systemctl" "${@:2}" ;;
  *) echo "$*" >> "$HOME/system" ;;
esac""",
    "systemctl": r'''echo "systemctl $*" >> "$HOME/system"
case "$*" in
  *is-active*) [ -e "$HOME/active" ] && { [[ $* == *quiet* ]] || echo active; exit 0; }
               [[ $* == *quiet* ]] || echo inactive; exit 3 ;;
  start*) touch "$HOME/active" ;;
  stop*) rm -f "$HOME/active" ;;
esac''',
    "journalctl": 'echo "journalctl $*" >> "$HOME/system"; echo step 12/12',
    "uv": r'''echo "uv $*" >> "$HOME/system"
if [ "$1" = venv ]; then mkdir -p "${@: -1}/bin"; fi
if [ "$1" = pip ]; then
  bin=$(dirname "$5")
  printf '%s\n' '#!/bin/bash' '[ "$1" = --version ] && { echo chinchilla_jax 0; exit; }' \
    '. "$HOME/body"' > "$bin/chinchilla"
  chmod +x "$bin/chinchilla"
fi''',
    "hostname": 'basename "$HOME"',
    "gcsfuse": "true",
    "mountpoint": "false",
}


class Cloud:
  """A cloud in a folder, with `machines` machines in its slice."""

  def __init__(self, folder: pathlib.Path, python: str, machines: int = 2):
    self.folder = folder
    for name in ("bin", "vm"):
      (folder / name).mkdir(parents=True)
    self._script("bin/gcloud", _GCLOUD.replace("{python}", python))
    self._script("bin/sleep-at-once", f'#!/bin/bash\necho "$1" >> {folder}/slept\n')
    for name, body in _VM.items():
      self._script(f"vm/{name}", f"#!/bin/bash\n{body}\n")
    shutil.copy(folder / "bin/gcloud", folder / "vm/gcloud")
    for index in range(machines):
      (folder / f"machines/vm-{index}").mkdir(parents=True)
    self.machines = sorted((folder / "machines").iterdir())
    (folder / "states").write_text("")
    self.answers = []

  def _script(self, name: str, text: str) -> None:
    (self.folder / name).write_text(text)
    (self.folder / name).chmod(0o755)

  def state(self, *states: str) -> None:
    """What the slice's state is, one question after the other; the last one stays."""
    (self.folder / "states").write_text(" ".join(states))

  def answer(self, to: str, status: int = 0, out: str = "", err: str = "", times: int = 1) -> None:
    """To commands that have `to` in them."""
    self.answers.append({"to": to, "status": status, "out": out, "err": err, "times": times})

  @property
  def environ(self) -> dict[str, str]:
    """No variable of the caller's account on a real cloud is in it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("CLOUDSDK")}
    return own | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "FAKE_CLOUD": str(self.folder),
                  "CLOUDSDK_CONFIG": str(self.folder / "config"), "SLEEP": "sleep-at-once"}

  def run(self, script: pathlib.Path, *words: str, stdin: str = "",
          **environ: str) -> subprocess.CompletedProcess:
    (self.folder / "answers.json").write_text(json.dumps(self.answers))
    return subprocess.run([str(script), *words], env=self.environ | environ, text=True, input=stdin,
                          capture_output=True, timeout=120)

  @property
  def calls(self) -> list[str]:
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [shlex.join(json.loads(line)) for line in lines]


def checkout(folder: pathlib.Path) -> pathlib.Path:
  """A small git repository with the launchers, as they are now."""
  for name in ("launch", "chinchilla_jax", "setup.py"):
    source = ROOT / name
    if source.is_dir():
      shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(source, folder / name)
  git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
  for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=now"]):
    subprocess.run([*git, *words], check=True)
  return folder
