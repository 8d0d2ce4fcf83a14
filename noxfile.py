"""The lanes: the whole suite on the newest transformers, and what must hold on every release on each minor one.

nox -s newest                  the whole suite, versions as in constraints.txt
nox -s minors                  every supported minor release; `nox -s "minors(transformers='5.19.0')"` for one
nox -s prerelease              the newest pre-release of transformers
nox -s integrations            export and quantization with the packages of those extras, the slow tests too
python scripts/version_table.py   runs `minors` and prints what passed, release by release
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["newest"]

MINORS = ("5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")

# What must pass on every release: kind -> the test files.
LANE = {
    "goldens": ("tests/models/*/test_modeling_*.py", "tests/models/*/test_quantization.py"),
    "features": ("tests/test_features.py",),
    "tokenizers": ("tests/models/*/test_tokenization_*.py", "tests/tokenization/test_*.py"),
    "contract": ("tests/test_compat.py",),
}
# Other releases of transformers resolve to other versions of these.
FOLLOW_TRANSFORMERS = ("transformers", "huggingface_hub", "tokenizers", "peft", "trl", "datasets", "accelerate")
REPORTS = Path(".nox/reports")
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def lane_files() -> list[str]:
    return [str(path) for patterns in LANE.values() for pattern in patterns for path in sorted(Path().glob(pattern))]


def install(session: nox.Session, *requirements: str) -> None:
    """The package with its tests' dependencies, beside `requirements`, which the pins must not contradict."""
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    free = Path(session.create_tmp()) / "constraints.txt"
    free.write_text("\n".join(pin for pin in pins if not pin.startswith(FOLLOW_TRANSFORMERS)), encoding="utf-8")
    session.install("-c", str(free.resolve()), *requirements, "-e", ".[dev]")


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
def integrations(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev,export,quantize]")
    session.run("pytest", "-m", "not sweep", "tests/integrations", *session.posargs, env=OFFLINE)
