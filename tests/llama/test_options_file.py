"""Files of options: those of a run repeat it, and values are as on the command line."""

import dataclasses

import pytest
from command_lines import assert_one_line

from examples.common.cli import options_text
from examples.common.errors import ConfigError
from examples.finetune.encoder import __main__ as encoder
from examples.finetune.planner import __main__ as planner
from examples.llama import __main__ as llama

EXAMPLES = (
    (llama, "--preset 60m --bf16 --per-layer --model.stacked --data a b --sample=-x"),
    (llama, "--optimizer galore --learning-rate 5e-3 --clip-norm 1 --log-to wandb --resume"),
    (encoder, "--preset galore-rank-8 --task rte --no-save-model --methods lora adamw"),
    (llama, "--optimizer galore --stagger True"),
    (llama, "--optimizer galore --stagger False"),
    (llama, "--name on --text-column 010 --data 2024-01-01 null --root ~x/yes"),
    (llama, "--name null --text-column None --data=-x --sample= --tokenizer 1:30"),
    (llama, "--rollback-on-spike inf --clip-norm 1e30 --eps 1e-08 --log-to --name .inf"),
    (llama, "--name 1_000 --init-from true --split-seed 010 --text-column <<"),
    (llama, "--name=: --text-column={a} --tokenizer=#"),
    (planner, "--bf16 --parts sgd --details --limit 3 --moment-bits 8"),
)


@pytest.mark.parametrize(("program", "options"), EXAMPLES)
def test_a_file_of_options_repeats_a_run(program, options, tmp_path):
    config = program.parse(options.split())
    file = tmp_path / "config.yaml"
    file.write_text(options_text(config, "examples"))
    output = dataclasses.replace(config.output, resume=False)
    again = dataclasses.replace(config, output=output)
    assert program.parse(["--config", str(file)]) == again
    other = program.parse([f"--config={file}", "--seed", "7", "--name", "other"])
    output = dataclasses.replace(output, name="other")
    assert other == dataclasses.replace(again, seed=7, output=output)


@pytest.mark.parametrize(
    "text", ['it\'s\n a "line"\r\t\x85\u2028', " spaces ", "'", "\U0001f600", "-1", "- x"]
)
def test_texts_are_read_as_they_were(text, tmp_path):
    config = llama.parse([f"--sample={text}"])
    (tmp_path / "config.yaml").write_text(options_text(config, "examples"))
    assert llama.parse([f"--config={tmp_path / 'config.yaml'}"]) == config


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("name: on", "--name=on"),
        ("name: 010", "--name=010"),
        ("rank: 010", "--rank=10"),
        ("name: 2024-01-01", "--name=2024-01-01"),
        ("name: 2024-13-01", "--name=2024-13-01"),
        ("name: 1e3", "--name=1e3"),
        ("data: [no, 0x10, 1:30]", "--data no 0x10 1:30"),
        ("data: yes", "--data=yes"),
        ("clip-norm: null", ""),
        ("clip-norm: ~", ""),
        ("clip-norm:", ""),
        ("rollback-on-spike: .inf", "--rollback-on-spike=inf"),
        ("learning-rate: 1_0.5e-3", "--learning-rate=10.5e-3"),
        ("optimizer: galore\nstagger: true", "--optimizer=galore --stagger=True"),
        ("optimizer: galore\nstagger: off", "--optimizer=galore --stagger=False"),
        ("optimizer: galore\nstagger: 'True'", "--optimizer=galore --stagger=True"),
        ("optimizer: galore\nstagger: null", "--optimizer=galore"),
        ("skip-bad-lines: yes", "--skip-bad-lines"),
        ("skip-bad-lines: Off", ""),
    ],
)
def test_values_are_what_they_would_be_on_the_command_line(line, option, tmp_path):
    (tmp_path / "some.yaml").write_text(line)
    assert llama.parse([f"--config={tmp_path / 'some.yaml'}"]) == llama.parse(option.split())


def test_a_file_of_some_options(tmp_path):
    """Flags of the command line undo those of the file."""
    file = tmp_path / "options.yaml"
    file.write_text("# mine\npreset: 60m\nbf16: true\nmodel.stacked: true\nlearning-rate: 5e-3\n")
    config = llama.parse(["--config", str(file), "--model.no-stacked", "--steps", "3"])
    assert config == llama.parse(
        ["--preset", "60m", "--bf16", "--learning-rate", "5e-3", "--steps", "3"]
    )


def test_a_file_undoes_a_shorthand(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("bf16: false\n")
    for program in (llama, planner):
        assert program.parse(["--bf16", "--no-bf16"]) == program.parse([])
        assert program.parse(["--config", str(file)]) == program.parse([])
    file.write_text("# nothing\n")
    assert llama.parse(["--config", str(file)]) == llama.parse([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {layers: 3}", "expected a line for each option, such as `model.layers: 4`"),
        ("- steps", "expected a line for each option"),
        ("steps: [", "not YAML"),
        (
            "steps: 3\ntext-column: null",
            "options.yaml: line 2: text-column: null, expected a value",
        ),
        ("seed:\n", "options.yaml: line 1: seed: null, expected a value"),
        ("data: [a,\n  null]", "options.yaml: line 2: data: null, expected a value"),
        ("quiet: 1", "options.yaml: line 1: quiet: expected true or false, got '1'"),
        ("\nbf16: maybe", "options.yaml: line 2: bf16: expected true or false, got 'maybe'"),
        ("seed: 1\nstepz: 5", "options.yaml: line 2: stepz: no such option; steps is one"),
        ("steps: 5\n\nsteps: 7", "options.yaml: line 3: steps: this option is there twice"),
        ("steps: [1, 2]", "options.yaml: line 1: steps: a list, expected one value"),
        ("optimizer: galore\nstagger: often", "line 2: stagger: expected true or false"),
        (None, "options.yaml: No such file"),
    ],
)
def test_a_bad_file_of_options_is_an_error_of_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "options.yaml"
    if text is not None:
        file.write_text(text)
    assert llama.main(["--config", str(file)]) == 1
    assert_one_line(capsys, message)
    assert llama.main(["--config"]) == 1
    assert_one_line(capsys, "--config needs a file of options")


def test_the_file_of_a_run_has_the_sizes_of_its_preset(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(options_text(llama.parse(["--preset", "60m"]), "examples"))
    assert llama.parse([f"--config={file}", "--preset=60m"]).preset == "60m"
    for other in ("350m", "nano"):
        with pytest.raises(
            ConfigError, match=f"--preset 60m and {other}: the config.yaml of a run"
        ):
            llama.parse([f"--config={file}", "--preset", other])


def test_underscores_are_those_of_the_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model.tied_embeddings: true\nper_layer: false\nlearning_rate: 0.5\n")
    config = llama.parse(["--config", str(file)])
    assert config.model.tied_embeddings and not config.per_layer
    assert config.learning_rate == 0.5
