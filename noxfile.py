"""The lanes: the whole suite on the newest transformers, and what must hold on every release on each minor one.

nox -s newest                  the whole suite, versions as in constraints.txt
nox -s slow                    what the suite leaves out: whole products of families and trainers, long trainings
nox -s minors                  every supported minor release; `nox -s "minors(transformers='5.19.0')"` for one
nox -s prerelease              the newest pre-release of transformers
nox -s torches                 the oldest torch that is supported, and the newest that has been tried
nox -s tools                   the command-line tools of docs/tools.md, lm_eval too
nox -s week                    a newcomer's week with one family, on nothing but the wheel; `nox -s week -- -k wheel` with all
nox -s docs                    the site; a warning is an error. `nox -s docs -- serve` shows it while you write
nox -s release                 sdist and wheel: built, checked, and what is in them; the citation file
nox -s web                     the chat's page in a browser: Chromium from the PATH, or Playwright's own
nox -s quantized               `hf-cnllm quantize` with bitsandbytes and torchao, the slow tests too
nox -s gguf                    exports through llama.cpp: its converter, its tokenizer and its engine, which is compiled
nox -s corpus                  the corpus pipeline on Ray, with fastText's models and on real text
nox -s vllm                    the models for vLLM, in an environment of their own
nox -s integrations            export and quantization with the packages of those extras, quantized training, the slow tests too
nox -s deepspeed               every family on two processes with ZeRO-2 and ZeRO-3, on the CPU
python scripts/version_table.py   runs `minors` and prints what passed, release by release
"""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["newest"]

TORCHES = ("2.7.0", "2.15.0")
MINORS = ("5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")

# What must pass on every release: kind -> the test files.
LANE = {
    "goldens": ("tests/models/*/test_modeling_*.py", "tests/models/*/test_quantization.py"),
    "features": ("tests/test_features.py", "tests/loss/test_trainer.py"),
    "tokenizers": ("tests/models/*/test_tokenization_*.py", "tests/tokenization/test_*.py"),
    "contract": ("tests/test_compat.py",),
}
# llama.cpp as it lies in the sources of llama-cpp-python: the newest, and the last one tried whose converter takes Baichuan.
LLAMA_CPP = {"HF_CNLLM_LLAMA_CPP": "0.3.36", "HF_CNLLM_LLAMA_CPP_FOR_BAICHUAN": "0.3.16"}
# Other releases of transformers resolve to other versions of these.
FOLLOW_TRANSFORMERS = ("transformers", "huggingface_hub", "tokenizers", "peft", "trl", "datasets", "accelerate")
REPORTS = Path(".nox/reports")
OFFLINE = {"HF_HUB_OFFLINE": "1"}
EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]


def lane_files() -> list[str]:
    return [str(path) for patterns in LANE.values() for pattern in patterns for path in sorted(Path().glob(pattern))]


def install(session: nox.Session, *requirements: str, free: tuple[str, ...] = FOLLOW_TRANSFORMERS) -> None:
    """The package with its tests' dependencies, beside `requirements`; the pins hold but of what is `free`."""
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = Path(session.create_tmp()) / "constraints.txt"
    kept.write_text("\n".join(pin for pin in pins if not pin.startswith(free)), encoding="utf-8")
    session.install("-c", str(kept.resolve()), *requirements, "-e", ".[dev]")


def run_lane(session: nox.Session, name: str) -> None:
    report = REPORTS.resolve() / f"{name}.xml"
    report.unlink(missing_ok=True)
    session.run(
        "pytest", "-n", "2", "-m", "not slow", f"--junitxml={report}", *lane_files(), *session.posargs, env=OFFLINE
    )


@nox.session
def newest(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs, env=OFFLINE)


@nox.session
def slow(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("pytest", "-n", "2", "-m", "slow and not sweep", *session.posargs, env=OFFLINE)


@nox.session
@nox.parametrize("transformers", MINORS)
def minors(session: nox.Session, transformers: str) -> None:
    install(session, f"transformers=={transformers}")
    run_lane(session, transformers)


@nox.session
def prerelease(session: nox.Session) -> None:
    install(session, "--pre", "transformers")
    run_lane(session, "prerelease")
    session.run("hf-cnllm", "doctor", env=OFFLINE)


@nox.session
@nox.parametrize("torch", TORCHES)
def torches(session: nox.Session, torch: str) -> None:
    install(session, f"torch=={torch}", free=("torch==",))
    run_lane(session, f"torch-{torch}")


@nox.session
def tools(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev,eval]")
    session.run("pytest", "tests/integrations", "tests/cli", *session.posargs, env=OFFLINE)


@nox.session
def week(session: nox.Session) -> None:
    """The package is installed as a wheel, and nothing else but its extras and pytest: a forgotten dependency is missed."""
    session.install("-c", "constraints.txt", ".[train,serve,eval]", "pytest")
    tests = session.posargs or ["-k", "wheel and baichuan"]
    session.run("pytest", "-m", "", "tests/integrations/test_week.py", *tests, env=OFFLINE)


@nox.session
def docs(session: nox.Session) -> None:
    """The API pages are read from the sources: neither the package nor torch is installed."""
    session.install("-c", "constraints.txt", *EXTRAS["docs"], "pytest")
    env = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env=env)
    if not session.posargs:
        session.run("pytest", "-m", "", "--noconftest", "tests/docs/test_site.py", env=env)


@nox.session
def release(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", *EXTRAS["release"], "pytest")
    session.run("pytest", "--noconftest", "tests/release", *session.posargs)


@nox.session
def web(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev,web]", "playwright")
    if shutil.which("chromium") is None:
        session.run("playwright", "install", "chromium")
    session.run("pytest", "-m", "", "tests/cli/test_chat_web.py", *session.posargs, env=OFFLINE)


@nox.session
def quantized(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev]", "bitsandbytes", "torchao")
    session.run("pytest", "-m", "", "tests/cli/test_quantize.py", *session.posargs, env=OFFLINE)


@nox.session
def corpus(session: nox.Session) -> None:
    """fastText's wheel is one for Python 3.10 to 3.12."""
    session.install("-c", "constraints.txt", "-e", ".[dev]", "fasttext-numpy2-wheel", "ray[default]", "snownlp")
    session.run("pytest", "-m", "not sweep", "tests/data/corpus", *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none")
def vllm(session: nox.Session) -> None:
    folder = Path(session.create_tmp()) / "vllm"
    if not (folder / "bin" / "pytest").exists():
        session.run("bash", "scripts/vllm_environment.sh", str(folder), external=True)
    tests = session.posargs or ["tests/vllm_engine"]
    session.run(
        str(folder / "bin" / "python"), "-m", "pytest", *tests, env=OFFLINE | {"OMP_NUM_THREADS": "1"}, external=True
    )


@nox.session
def gguf(session: nox.Session) -> None:
    newest = f"llama-cpp-python=={LLAMA_CPP['HF_CNLLM_LLAMA_CPP']}"
    session.install("-c", "constraints.txt", "-e", ".[dev]", newest, "gguf", "mistral_common")
    env = dict(OFFLINE)
    for name, version in LLAMA_CPP.items():
        place = Path(session.create_tmp()).resolve() / version
        wanted = ("--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}")
        session.run("pip", "download", "-d", str(place), *wanted)
        shutil.unpack_archive(next(place.glob("*.tar.gz")), place)
        env[name] = str(next(place.glob("*/vendor/llama.cpp")))
    session.run("pytest", "-m", "slow", "tests/conversion/test_gguf.py", *session.posargs, env=env)


@nox.session
def integrations(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev,export,quantize]", "openvino")
    tests = ("tests/integrations", "tests/conversion", "tests/training/test_quantized_training.py")
    session.run("pytest", "-m", "not sweep", *tests, *session.posargs, env=OFFLINE)


@nox.session
def deepspeed(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev]", "deepspeed", "ninja")
    session.run(
        "pytest", "-m", "slow", "-k", "zero", "tests/training/test_processes.py", *session.posargs, env=OFFLINE
    )
