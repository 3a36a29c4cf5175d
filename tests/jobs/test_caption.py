"""The caption job refuses wrong configurations before it starts."""

from tests.integration.jobs import run


def _refused(tmp_path, *overrides):
    done = run("caption", f"source.uri={tmp_path}", f"sink.uri={tmp_path / 'out'}", *overrides, check=False)
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
    return done.stderr


def test_model_that_is_not_to_be_had_is_told_in_one_line(tmp_path):
    message = _refused(tmp_path, "model.name=nobody/nothing")
    assert message.count("\n") == 1
    assert message.startswith("error: model.name nobody/nothing: cannot be loaded")
    assert "model.path" in message


def test_unknown_keys_wrong_types_and_impossible_values_are_named_together(tmp_path):
    message = _refused(tmp_path, "frames.fsp=1", "frames.batch_frames=many", "lightkv.retention=2")
    assert "frames.fsp: unknown key; did you mean fps?" in message
    assert "frames.batch_frames: Input should be a valid integer, got 'many'" in message
    assert "lightkv.retention: Input should be less than or equal to 1, got 2" in message
