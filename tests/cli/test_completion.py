"""What a shell is told when the user presses Tab, in this process: as the script that typer installs asks for it."""

from __future__ import annotations

import pytest
from cllm_spheres_cli.app import app
from typer.main import get_command


def completed(words, shell="bash"):
    """The completions of the last word of a command line."""
    environment = {
        "bash": {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": " ".join(words)},
    }[shell]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "_CLLM_SPHERES_COMPLETE": f"complete_{shell}"}.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            get_command(app)(prog_name="cllm-spheres")
        assert left.value.code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cllm-spheres", "pr"], {"prune", "prepare"}),
        (["cllm-spheres", "train", "--early"], {"--early-stop"}),
        (["cllm-spheres", "train", "--preset", "m"], {"minimal", "medium"}),
        (["cllm-spheres", "train", "--schedule", ""], {"cosine", "linear", "constant", "wsd"}),
    ],
)
def test_commands_options_and_values_are_completed(words, expected, capsys):
    completed(words)
    assert set(capsys.readouterr().out.split()) == expected
    completed(words, "zsh")
    told = capsys.readouterr().out
    assert all(f'"{word}"' in told for word in expected)


def test_the_script_of_a_shell_names_the_command(capsys):
    from typer._completion_shared import get_completion_script

    script = get_completion_script(prog_name="cllm-spheres", complete_var="_CLLM_SPHERES_COMPLETE", shell="bash")
    assert "complete -o default -F _cllm_spheres_completion cllm-spheres" in script
    assert {"--install-completion", "--show-completion"} <= {
        option for parameter in get_command(app).params for option in parameter.opts
    }
