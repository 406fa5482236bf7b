"""Distillation inside transformers: RT-DETR, RT-DETRv2, D-FINE and Deformable DETR, the stock Trainer and a loop."""

import pytest
import torch
from torchvision_cases import detector
from transformers_cases import CLASSES, KINDS, batch, model_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[hosts])")

from fastkd.integrations.transformers import attach  # noqa: E402


def attached(kind="RTDetr", method="icd", **options):
    model = model_of(kind).train()
    teacher = None if method == "lgd" else model_of(kind, width=64, seed=1).eval()
    return model, attach(model, method, teacher=teacher, num_classes=CLASSES, **{"detach_steps": 0} | options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_losses_join_and_reach_the_backbone(kind, method):
    model, kd = attached(kind, method)
    torch.manual_seed(3)
    output = model(**batch())
    own = {name: value for name, value in output.loss_dict.items() if name.startswith(f"{method}_")}
    assert f"{method}_distill" in own and all(value.isfinite() for value in own.values())
    if method == "lgd":
        assert "lgd_loss" in own
    plain = model_of(kind).train()
    torch.manual_seed(3)
    torch.testing.assert_close(output.loss, plain(**batch()).loss + sum(own.values()))
    own[f"{method}_distill"].backward(retain_graph=True)
    trained = model.model.input_proj if kind == "DeformableDetr" else model.model.backbone  # it freezes its backbone
    assert any(p.grad is not None and p.grad.any() for p in trained.parameters())
    kd.step()
    for key, value in plain.state_dict().items():  # the second pass leaves no trace in the statistics
        assert torch.equal(value, model.state_dict()[key]), key
    kd.detach()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not any(name.startswith(method) for name in model(**batch()).loss_dict)


@pytest.mark.parametrize("kind", ["RTDetr", "DeformableDetr"])
def test_an_output_as_a_tuple(kind):
    model, kd = attached(kind)
    torch.manual_seed(3)
    output = model(**batch(), return_dict=False)
    twin, _ = attached(kind)
    torch.manual_seed(3)
    named = twin(**batch())
    assert isinstance(output, tuple) and len(output) == len(named.to_tuple()) and kd.state.computed == 1
    assert torch.equal(output[0], named.loss) and "icd_distill" in output[1]
    assert isinstance(model.eval()(**batch(), return_dict=False), tuple) and kd.state.computed == 1


def test_images_of_a_teacher_with_its_processor():
    """It gets the student's images, or images normalised as by a processor of its own."""
    imagenet = transformers.DeformableDetrImageProcessor()
    plain = transformers.RTDetrImageProcessor()
    mean, std = (torch.tensor(value)[:, None, None] for value in (imagenet.image_mean, imagenet.image_std))
    pixels = batch()["pixel_values"]
    normalised = (pixels - mean) / std
    for student, processors, images, expected in [
        ("DeformableDetr", {"processor": imagenet}, normalised, normalised),
        ("DeformableDetr", {"processor": imagenet, "teacher_processor": plain}, normalised, pixels),
        ("RTDetr", {"teacher_processor": imagenet}, pixels, normalised),
        ("RTDetr", {"processor": plain}, pixels, pixels),
    ]:
        model, teacher = model_of(student).train(), model_of("DeformableDetr", width=64).eval()
        attach(model, "pkd", teacher=teacher, **processors)
        seen = []
        teacher.model.backbone.register_forward_pre_hook(lambda module, args, to=seen: to.append(args[0]))
        model(images, labels=batch()["labels"])
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_priors_from_a_loader():
    """Padded images, too: box sizes are fractions of the image without its padding."""
    mask = torch.ones(2, 64, 64, dtype=torch.int64)
    mask[1, 62:], mask[1, :, 61:] = 0, 0
    loader = [batch(seed=0), {**batch(seed=1), "pixel_mask": mask}]
    model, kd = attached()
    for data in loader:
        model(**data)
    given, given_kd = attached(priors=loader)
    given(**batch())
    for name in ("frequency", "mean", "std"):
        mine, theirs = (getattr(each.distillation.network.method, f"prior_{name}") for each in (given_kd, kd))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert given_kd.distillation.running is None
    with pytest.raises(TypeError, match="a loader of the model's inputs with 'pixel_values' and 'labels', got"):
        attach(model_of(), "icd", teacher=model_of().eval(), priors=[(torch.zeros(1), {})])


def test_no_distillation_without_labels_or_training():
    model, kd = attached()
    model(pixel_values=batch()["pixel_values"])
    with torch.no_grad():
        model(**batch())
    model.eval()(**batch())
    assert kd.state.computed == 0


def test_deformable_detr_teaches_and_learns_at_every_level():
    """Four levels with a stride of 64 besides; the report sees the host's own gradient at the levels."""
    model, kd = attached("DeformableDetr")
    loss = model(**batch()).loss
    loss.backward()
    assert kd.distillation.network.spec.pairs == ((0, 0), (1, 1), (2, 2), (3, 3))
    probe = kd.distillation.probe
    for total, ours in zip(probe.total, probe.norms["icd_distill"], strict=True):
        assert float(ours) > 0 and not torch.isclose(total, ours)
    student = model_of("RTDetr").train()
    other = attach(student, "pkd", teacher=model_of("DeformableDetr", width=64).eval(), detach_steps=0)
    student(**batch()).loss.backward()
    assert other.distillation.network.spec.pairs == ((0, 0), (1, 1), (2, 2))


def test_deformable_detr_with_padded_images():
    mask = torch.ones(2, 64, 64, dtype=torch.int64)
    mask[1, 48:], mask[1, :, 40:] = 0, 0
    for method in ("icd", "lgd"):
        model, kd = attached("DeformableDetr", method)
        assert model(**batch(), pixel_mask=mask).loss.isfinite()
        assert kd.distillation.probe.batch.image_sizes.tolist() == [[64, 64], [48, 40]]


def test_a_torchvision_detector_teaches():
    """Another architecture and normalisation; the levels of strides 8, 16, 32 match."""
    model = model_of().train()
    kd = attach(model, "icd", teacher=detector("retinanet", channels=64).eval(), num_classes=CLASSES, detach_steps=0)
    model(**batch()).loss.backward()
    assert kd.distillation.network.spec.pairs == ((0, 0), (1, 1), (2, 2))
    assert kd.teacher.normalization != kd.normalization
    assert "the teacher finds 0 of the 3 objects" in kd.report()


def test_pixel_mask_gives_the_size_of_an_image():
    model, kd = attached()
    mask = torch.ones(2, 64, 64, dtype=torch.int64)
    mask[1, 48:], mask[1, :, 40:] = 0, 0
    model(**batch(), pixel_mask=mask)
    assert kd.distillation.probe.batch.image_sizes.tolist() == [[64, 64], [48, 40]]


def test_autocast_and_a_loop_of_ones_own():
    model, kd = attached(total_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kd.step()
    assert loss.isfinite() and kd.state.steps == 2


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        both = batch((1,), seed=index)
        return {"pixel_values": both["pixel_values"][0], "labels": both["labels"][0]}


def collate(items):
    return {"pixel_values": torch.stack([i["pixel_values"] for i in items]), "labels": [i["labels"] for i in items]}


def trainer_of(model, kd, folder, **options):
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=4, logging_steps=1, save_steps=2, report_to=[],
        gradient_accumulation_steps=2, disable_tqdm=True, remove_unused_columns=False, use_cpu=True, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=Data(), data_collator=collate, callbacks=[kd.callback] if kd else None
    )


def test_the_stock_trainer_steps_logs_saves_and_resumes(tmp_path):
    model, kd = attached()
    trainer = trainer_of(model, kd, tmp_path)
    trainer.train()
    assert kd.state.steps == 4 and kd.distillation.total_steps == 4 and kd.state.computed == 8
    assert all("fastkd/icd_distill" in entry for entry in trainer.state.log_history if "loss" in entry)
    assert type(model).from_pretrained(tmp_path / "checkpoint-4").state_dict().keys() == model.state_dict().keys()
    again, again_kd = attached()
    trainer_of(again, again_kd, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again_kd.state.steps == 4
    for mine, theirs in zip(kd.distillation.network.parameters(), again_kd.distillation.network.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_resuming_from_a_checkpoint_elsewhere(tmp_path):
    """fastkd.pt is read beside the checkpoint in use, not in `output_dir`; if it is missing, a warning says so."""
    model, kd = attached()
    trainer_of(model, kd, tmp_path / "first").train()
    (tmp_path / "second").mkdir()
    trainer_of(*attached(seed=3), tmp_path / "second").train()  # other weights of the method
    moved = (tmp_path / "first" / "checkpoint-2").rename(tmp_path / "moved")
    again, again_kd = attached()
    trainer_of(again, again_kd, tmp_path / "second").train(resume_from_checkpoint=str(moved))
    assert again_kd.state.steps == 4
    for mine, theirs in zip(kd.distillation.network.parameters(), again_kd.distillation.network.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    saved = (moved / "fastkd.pt").rename(tmp_path / "kept.pt")
    again, again_kd = attached()
    with pytest.warns(UserWarning, match=r"resumes at step 2, but there is no .*moved/fastkd.pt: the method starts"):
        trainer_of(again, again_kd, tmp_path / "second").train(resume_from_checkpoint=str(moved))
    assert again_kd.state.steps == 2
    again, again_kd = attached()
    again_kd.load(saved)
    trainer_of(again, again_kd, tmp_path / "second").train(resume_from_checkpoint=str(moved))
    assert again_kd.state.steps == 4


def test_a_trainer_of_another_model(tmp_path):
    _, kd = attached()
    with pytest.raises(ValueError, match="must train the attached RTDetrForObjectDetection, got another"):
        trainer_of(model_of(), kd, tmp_path).train()


@pytest.mark.long
def test_the_trainer_compiles_the_model(tmp_path):
    """`torch_compile=True` wraps the attached model; backend "eager" traces it without a C++ compiler."""
    model, kd = attached()
    trainer_of(model, kd, tmp_path, torch_compile=True, torch_compile_backend="eager").train()
    assert kd.state.steps == 4 and kd.state.computed == 8 and kd.state.losses["icd_distill"] > 0


def test_bad_input():
    with pytest.raises(TypeError, match=r"must be RT-DETR, .*got Linear, which has no encoder"):
        attach(torch.nn.Linear(1, 1), "lgd")
    backbone = transformers.RTDetrResNetConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"])
    config = transformers.DetrConfig(backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1)
    detr = transformers.DetrForObjectDetection(config)
    with pytest.raises(TypeError, match=r"DetrForObjectDetection, whose encoder gives tokens of a single level"):
        attach(detr, "lgd")
    with pytest.raises(ValueError, match="must be the labels of the model, 5, got 7"):
        attach(model_of(), "lgd", num_classes=7)
    with pytest.warns(UserWarning, match="the teacher knows 7 classes, the student 5"):
        attach(model_of(), "icd", teacher=model_of(classes=7).eval())
