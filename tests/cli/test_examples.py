"""The examples of docs/loss.md run, train, and use the IB loss where they say."""

import re

import pytest
import torch


def criteria(text):
    return re.findall(r"^epoch \d+  (\w+)  last loss \d", text, flags=re.M)


def test_the_plain_loop(capsys):
    from examples import plain_loop

    scores = plain_loop.main()
    assert criteria(capsys.readouterr().out) == ["CrossEntropyLoss"] * 8 + ["IBLoss"] * 4
    assert scores[0] < 50 < scores[-1]  # chance is 10


def test_timm(capsys):
    pytest.importorskip("timm")
    from examples import timm_example

    scores = timm_example.main()
    assert criteria(capsys.readouterr().out) == ["CrossEntropyLoss"] * 7 + ["IBLoss"] * 3
    assert scores[0] < 30 < scores[-1]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_h_of_a_timm_model_is_the_input_of_its_last_layer(arch):
    timm = pytest.importorskip("timm")
    from examples.timm_example import WithH

    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=5).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        logits, h = WithH(model)(images)
        torch.testing.assert_close(logits, model(images))
        torch.testing.assert_close(h @ model.get_classifier().weight.T + model.get_classifier().bias, logits)


def test_lightning():
    pytest.importorskip("lightning")
    from examples import lightning_example

    score, alpha = lightning_example.main()
    assert score > 25
    assert 10 < alpha < 1e5  # calibrated: 1 is the value before
