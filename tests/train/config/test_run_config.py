"""Configs: merged, overridden, refused with every mistake at once, and the same after a round trip."""

import subprocess
import sys

import pytest

from armillary.train.config.run_config import ConfigError, RunConfig, check_vocabulary, dump_config, load_config


def write(path, text):
    path.write_text(text)
    return path


def test_defaults_survive_a_round_trip(tmp_path):
    config = load_config(write(tmp_path / "a.toml", ""))
    assert config == RunConfig()
    assert load_config(write(tmp_path / "b.toml", dump_config(config))) == config


def test_optional_tables_and_lists_survive_a_round_trip(tmp_path):
    text = """
    [model.rope_scaling]
    factor = 4.0
    [[data.sources]]
    path = "a.txt"
    weight = 2.5
    [[data.sources]]
    path = "stdlib"
    """
    config = load_config(write(tmp_path / "a.toml", text))
    assert config.model.rope_scaling is not None
    assert [source.weight for source in config.data.sources] == [2.5, 1.0]
    assert load_config(write(tmp_path / "b.toml", dump_config(config))) == config


def test_a_file_extends_others_and_the_command_line_comes_last(tmp_path):
    (tmp_path / "models").mkdir()
    write(tmp_path / "models/m.toml", "[model]\ndim = 64\nnum_layers = 3\n")
    write(tmp_path / "base.toml", 'extends = "models/m.toml"\n[optim]\nsteps = 7\n')
    path = write(tmp_path / "a.toml", 'extends = ["base.toml"]\n[model]\nnum_layers = 2\n')
    config = load_config(path, ["optim.learning_rate=1e-2", "data.tokenizer=bytes"], "dp=3")
    assert (config.model.dim, config.model.num_layers, config.optim.steps) == (64, 2, 7)
    assert (config.optim.learning_rate, config.data.tokenizer, config.plan.dp) == (0.01, "bytes", 3)


def test_a_short_plan_may_hold_lists_and_words(tmp_path):
    (tmp_path / "a.toml").write_text("model.num_layers = 4")
    plan = load_config(tmp_path / "a.toml", plan="pp=2, layers=[3,1],tp=2,schedule=gpipe").plan
    assert (plan.pp, plan.layers, plan.tp, plan.schedule, plan.num_ranks) == (2, (3, 1), 2, "gpipe", 4)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ("pp=4", "--plan: plan.pp: 4 pipeline stages (plan.pp times stages a rank) are more than model.num_layers = 2"),
        ("pp=2,schedule=zbv", "4 pipeline stages (plan.pp times stages a rank) are more than model.num_layers = 2"),
        ("pp=2,layers=[3,1]", "plan.layers = [3, 1] adds up to 4; it must be model.num_layers = 2"),
        ("pp=2,layers=[2]", "--plan: plan.layers: names 1 stages, but the pipeline has 2"),
        ("pp=2,schedule=gpipe,stages_per_rank=2", "plan.stages_per_rank: is 2; gpipe has one stage a rank"),
        ("tp=5", "--plan: plan.tp: is 5; tensor ranks share out heads, and model.num_heads is 4"),
    ],
)
def test_a_plan_that_the_model_does_not_fill_is_refused(tmp_path, plan, sentence):
    (tmp_path / "a.toml").write_text("[model]\nnum_layers = 2\nnum_heads = 4")
    with pytest.raises(ValueError) as refused:
        load_config(tmp_path / "a.toml", plan=plan)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_degrees_that_a_short_plan_leaves_out_are_1(tmp_path):
    path = write(tmp_path / "a.toml", '[plan]\ndp = 4\nplacement = "striped"\n')
    plan = load_config(path, [], "cp=2, context=token_ring").plan
    assert (plan.dp, plan.cp, plan.context, plan.placement, plan.num_ranks) == (1, 2, "token_ring", "striped", 2)
    assert str(plan) == "dp=1,cp=2,context=token_ring"
    assert load_config(path, ["plan.dp=3"], "cp=2").plan.num_ranks == 6
    assert load_config(path, ["plan.cp=2"]).plan.num_ranks == 8


def test_every_mistake_is_told_at_once_with_its_place(tmp_path):
    base = write(tmp_path / "base.toml", "[model]\nnum_layer = 2\n")
    path = write(tmp_path / "a.toml", 'extends = "base.toml"\n[optim]\nsteps = "many"\nlearning_rate = 0.1\n[modle]\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["metrics.wandb=sometimes"])
    lines = sorted(str(caught.value).splitlines())
    assert lines == sorted(
        [
            f"{base}: model.num_layer: unknown key; did you mean model.num_layers?",
            f"{path}: optim.steps: should be a valid integer; it is 'many'",
            f"{path}: modle: unknown key; did you mean model?",
            "--set: metrics.wandb: should be 'offline', 'online' or 'off'; it is 'sometimes'",
        ]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nsteps = 0", "optim.steps: must be at least 1; it is 0"),
        ("[optim]\nlearning_rate = nan", "optim.learning_rate: must be a finite number; it is nan"),
        ("[model]\ndim = 30\nnum_heads = 4", "model.num_heads: must divide model.dim = 30, or set model.head_dim"),
        ("[model]\nnum_kv_heads = 3", "model.num_kv_heads: must divide model.num_heads = 8"),
        ("[model]\ndim = 1.5", "model.dim: should be a valid integer"),
        ("[model]\ntie_embeddings = 1", "model.tie_embeddings: should be a valid boolean; it is 1"),
        ("[plan]\ncontext_level = 2", 'plan.context_level: is for plan.context = "hybrid"'),
        ('[plan]\ncp = 3\ncontext = "hybrid"\ncontext_level = 2', "plan.context_level: is 2, which does not divide"),
        ('[plan]\ncontext = "rings"', "plan.context: should be 'ring', 'bidirectional_ring'"),
        ("[plan]\nzz = 2", "plan.zz: unknown key; allowed here: pp, dp, cp, tp, schedule"),
        ("[model]\nrope_scaling = 3", "model.rope_scaling: "),
        ('[[data.sources]]\npath = "x"\nwieght = 2', "data.sources[0].wieght: unknown key; did you mean"),
        ("data = 3", "data: "),
        ("[model\n", "is not valid TOML"),
        ("[optim]\nsteps = " + "9" * 5000, "is not valid TOML"),
        ("dim = " + "[" * 5000, "is not valid TOML"),
        ("[optim]\nsteps = 9223372036854775808", "optim.steps: must be below 2**63; it is 9223372036854775808"),
        ("[model]\nDIM = 64", "model.DIM: unknown key; did you mean model.dim?"),
        ("[Model]\ndim = 64", "Model: unknown key; did you mean model?"),
        ("[model.rope_scaling]\nFoo = 1", "model.rope_scaling.Foo: unknown key"),
        ("extends = 3", 'extends: takes a file, or a list of files, such as "base.toml"; it is 3'),
        ("extends = ['']", "extends: takes a file"),
    ],
)
def test_a_mistake_names_its_key(tmp_path, text, message):
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "demo.toml", "")
    with pytest.raises(ConfigError, match=r"no such config file; did you mean .*demo\.toml\?"):
        load_config(tmp_path / "dmo.toml")
    path = write(tmp_path / "a.toml", 'extends = "dmo.toml"')
    with pytest.raises(ConfigError, match=r"dmo\.toml, which .*a\.toml extends: there is no such config file"):
        load_config(path)


def test_a_file_that_links_to_itself_is_refused(tmp_path):
    (tmp_path / "a.toml").symlink_to(tmp_path / "a.toml")
    with pytest.raises(ConfigError, match=r"a\.toml: cannot be read"):
        load_config(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("dp=2,dp=3", "--plan: plan.dp: is given twice; give it once"),
        ("=2", '--plan : write it as degree=number, for example "dp=2"'),
        ("plan.dp=2", "--plan: plan.plan: unknown key"),
    ],
)
def test_a_malformed_plan_is_refused(tmp_path, plan, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "a.toml", "[plan]\ncp = 2"), plan=plan)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["optim.steps", "=3", "optim..steps=3"])
def test_a_malformed_override_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"write it as section\.key=value"):
        load_config(write(tmp_path / "a.toml", ""), [text])


def test_an_override_is_utf8_in_any_locale(tmp_path):
    path = write(tmp_path / "a.toml", "")
    assert load_config(path, ['metrics.project="\udcc3\udca9"']).metrics.project == "\u00e9"
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(path, ['metrics.project="\udcff"'])


def test_a_file_that_extends_itself_is_refused(tmp_path):
    path = write(tmp_path / "a.toml", 'extends = "b.toml"')
    write(tmp_path / "b.toml", 'extends = "a.toml"')
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(path)


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match=r"model\.vocab_size: 4096 is too small .* set model\.vocab_size = 5000"):
        check_vocabulary(RunConfig(), 5000)


def test_no_torch_is_imported():
    code = "import sys, armillary.train.config.run_config, armillary.launch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_of_a_windows_editor_is_read(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[optim]\r\nsteps = 7\r\n")
    assert load_config(path).optim.steps == 7
