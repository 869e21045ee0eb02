"""`kdflow export`: the student of a finished run, for others."""

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import ConfigError
from flows.store_commands import DEFAULTS, Root, Scratch
from storage.store import ArtifactStore
from tasks.presentation.history import chosen_runs
from tasks.presentation.results import student_path

CONVERTER = "convert_hf_to_gguf.py"  # llama.cpp's


def export(
    run: Annotated[str, typer.Argument(help="An id of `kdflow history`, or a run's name.")],
    folder: Annotated[Path | None, typer.Option(help="Copy it to this folder.")] = None,
    hub: Annotated[
        str | None, typer.Option(help="Upload it to this model of the Hugging Face hub.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Where the hub has no such model: a private one.")
    ] = False,
    gguf: Annotated[
        Path | None, typer.Option(help="Write this GGUF file, by llama.cpp's converter.")
    ] = None,
    root: Root = DEFAULTS.root,
    scratch: Scratch = DEFAULTS.scratch,
) -> None:
    """Hand on the student of a finished run: to a folder, the hub, or as GGUF."""
    if folder is None and hub is None and gguf is None:
        raise ConfigError("say where to: --folder, --hub or --gguf")
    store = ArtifactStore(root=root, scratch=scratch)
    (chosen,) = chosen_runs(store, [run])
    student = student_path(store, chosen.refs["train"])
    if folder is not None:
        if folder.exists():
            raise ConfigError(f"{folder} is there already; give another name, or remove it")
        shutil.copytree(student, folder)
        typer.echo(f"{folder.absolute()}")
    if gguf is not None:
        typer.echo(f"{_written(student, gguf)}")
    if hub is not None:
        typer.echo(_uploaded(student, hub, private=private))


def _written(student: Path, target: Path) -> Path:
    """A GGUF file. Raises ConfigError."""
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise ConfigError(f"--gguf needs llama.cpp's {CONVERTER}, which is not on the path")
    command = [converter, str(student), "--outfile", str(target.absolute())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        raise ConfigError(f"{CONVERTER} wrote no {target}: {done.stderr.strip()[-500:]}")
    return target.absolute()


def _uploaded(student: Path, name: str, *, private: bool) -> str:
    """The address of a model on the hub that has the student now. Raises ConfigError."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - takes long to import
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError  # noqa: PLC0415

    api = HfApi()
    try:
        # What is there stays as private, or as public, as it is.
        if not api.repo_exists(name):
            name = api.create_repo(name, private=private).repo_id  # with its owner
        made = api.upload_folder(
            repo_id=name, folder_path=student, commit_message="A student distilled by kdflow"
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be written on the hub ({error}); log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        ) from error
    return str(made.commit_url)
