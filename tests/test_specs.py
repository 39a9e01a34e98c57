"""What names a scorer or a captioner: a name stays one, a folder counts with its content."""

from pathlib import Path

from finecap_ray.specs import absolute_spec, spec_inputs


def test_a_name_is_itself_and_a_folder_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("captioner").mkdir()
    assert absolute_spec("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert absolute_spec("captioner") == str(tmp_path / "captioner")
    assert spec_inputs("ViT-B-32/openai") == "ViT-B-32/openai"


def test_a_folder_that_is_trained_again_in_its_place_is_another_input(tmp_path):
    """In another process: a process takes a folder for what it was when it looked first."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, weights in ((first, b"1"), (second, b"2")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "log.out").write_bytes(weights)
    one, two = spec_inputs(str(first)), spec_inputs(str(second))
    assert one["path"] == str(first) and one["content"] != two["content"]
    third = tmp_path / "third"
    third.mkdir()
    (third / "model.safetensors").write_bytes(b"1")
    assert spec_inputs(str(third))["content"] == one["content"]  # a log is no input
