# SPDX-License-Identifier: Apache-2.0
"""Gene-backed networks in the Trainer of transformers: learning, resuming bit for bit, gene folders, logged values."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_samples import OddNet
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.errors import ArgumentError, MethodError
from pylearngene.methods import TLEG, Expansion
from pylearngene.training import GeneCallback

pytestmark = pytest.mark.hosts


def bert(learn: bool = False) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    method = Expansion(TLEG().coefficients(3), learn=True) if learn else TLEG()
    return plg.auxiliary(transformers.BertForSequenceClassification(config), method)


def texts(count: int = 48) -> list[dict[str, Tensor]]:
    """Random ids; the label follows from the first of them."""
    ids = torch.randint(0, 12, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def arguments(folder: Path, **changes: Any) -> Any:
    import transformers

    options = {
        "max_steps": 6, "save_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**options, **changes})


def trainer(net: nn.Module, folder: Path, *, own: bool = False, callback: Any = None, **changes: Any) -> Any:
    import transformers

    groups = plg.param_groups(net, lr=1e-2, gene_lr=5e-3, weight_decay=0.1)
    optimizers = (torch.optim.AdamW(groups), None) if own else (None, None)
    return transformers.Trainer(
        net, arguments(folder, **changes), train_dataset=texts(), eval_dataset=texts(16), optimizers=optimizers,
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip


def logits(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(torch.stack([text["input_ids"] for text in texts(16)])).logits


def same_tensors(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("own", [False, True], ids=["the Trainer's optimizer", "param_groups"])
def test_it_learns_without_a_dense_weight(own: bool, tmp_path: Path) -> None:
    net = bert()
    before = plg.nn.dense_syntheses()
    run = trainer(net, tmp_path, own=own, max_steps=60, save_strategy="no", eval_steps=20)
    run.train()
    losses = [record["eval_loss"] for record in run.state.log_history if "eval_loss" in record]
    assert losses[-1] < 0.5 * math.log(3)
    assert plg.nn.dense_syntheses() == before
    labels = torch.stack([text["labels"] for text in texts(16)])
    assert losses[-1] == pytest.approx(float(F.cross_entropy(logits(plg.bake(net)), labels)), rel=1e-4)


def test_the_trainers_own_optimizer_decays_what_ours_does(tmp_path: Path) -> None:
    run = trainer(bert(), tmp_path, weight_decay=0.1)
    run.create_optimizer()
    decaying = {id(p) for group in run.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    groups = plg.param_groups(run.model, 1.0, weight_decay=0.1)
    assert decaying == {id(p) for group in groups if group["weight_decay"] for p in group["params"]}


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("own", [False, True], ids=["the Trainer's optimizer", "param_groups"])
def test_a_resumed_run_ends_with_the_same_bits(own: bool, learn: bool, tmp_path: Path) -> None:
    straight, resumed = bert(learn), bert(learn)
    trainer(straight, tmp_path, own=own).train()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)
    run = trainer(resumed, tmp_path, own=own)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert run.state.global_step == 6
    assert same_tensors(straight, resumed)


def test_every_checkpoint_is_a_gene_folder_of_its_step(tmp_path: Path) -> None:
    import transformers

    seen: dict[int, Tensor] = {}

    class Watch(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen[state.global_step] = logits(model)

    net = bert()
    run = trainer(net, tmp_path, callback=GeneCallback())
    run.add_callback(Watch())
    run.train()
    assert seen.keys() == {3, 6}
    for step, expected in seen.items():
        again = plg.Learngene.from_pretrained(tmp_path / f"checkpoint-{step}").descend()
        assert torch.equal(logits(again), expected)
    assert torch.equal(logits(plg.Learngene.from_pretrained(tmp_path).descend()), logits(net))
    run.save_model()
    assert torch.equal(logits(plg.Learngene.from_pretrained(tmp_path).descend()), logits(net))


def test_the_best_model_is_loaded_and_written(tmp_path: Path) -> None:
    net = bert()
    # The loss falls, so that the highest one is that of an early checkpoint.
    run = trainer(net, tmp_path, callback=GeneCallback(), load_best_model_at_end=True, metric_for_best_model="loss",
                  greater_is_better=True, save_steps=1, eval_steps=1)  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    assert torch.equal(logits(plg.Learngene.from_pretrained(best).descend()), logits(net))
    assert torch.equal(logits(plg.Learngene.from_pretrained(tmp_path).descend()), logits(net))


def test_values_are_logged(tmp_path: Path) -> None:
    class Watch(GeneCallback):
        found: Tensor

        def on_pre_optimizer_step(self, *events: Any, model: Any, **others: Any) -> None:
            super().on_pre_optimizer_step(*events, model=model, **others)
            self.found = torch.cat([gene.grad.double().flatten() for _, gene in model.gene_bank.named_genes()])

    net, callback = bert(learn=True), Watch(log=["norm", "grad_norm", "coeffs"])
    run = trainer(net, tmp_path, callback=callback, eval_strategy="no", save_strategy="no")
    run.train()
    *steps, last = run.state.log_history
    assert len(steps) == 6
    assert "gene_norm" not in last
    genes = torch.cat([gene.detach().double().flatten() for _, gene in net.gene_bank.named_genes()])
    assert steps[-1]["gene_norm"] == pytest.approx(float(genes.norm()), rel=1e-5)
    assert steps[-1]["gene_grad_norm"] == pytest.approx(float(callback.found.norm()), rel=1e-5)
    coeffs = net.bert.encoder.layer[2].attention.self.query.coeffs.tolist()
    assert [steps[-1][f"coeff.2.attention.self.query.{k}"] for k in (0, 1)] == coeffs
    assert sum(name.startswith("coeff.") for name in steps[-1]) == 3 * 8 * 2
    assert not any(name.startswith("gene_") for name in trained_log(tmp_path / "quiet", GeneCallback(log=())))


def trained_log(folder: Path, callback: GeneCallback) -> dict[str, float]:
    run = trainer(bert(), folder, callback=callback, max_steps=1, eval_strategy="no", save_strategy="no")
    run.train()
    return run.state.log_history[0]


class Classifier(nn.Module):
    """A network of the user's own in the Trainer's terms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OddNet(3)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.net(pixels)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores} if labels is not None else {"logits": scores}


@pytest.mark.parametrize("save", [True, False])
def test_networks_of_other_kinds_are_saved_by_the_callback(save: bool, tmp_path: Path) -> None:
    import transformers

    def run(net: nn.Module, **resume: Any) -> None:
        data = [{"pixels": torch.randn(1, 28, 28), "labels": torch.tensor(k % 10)} for k in range(16)]
        torch.manual_seed(3)
        options = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
        transformers.Trainer(
            net, arguments(tmp_path, **options), train_dataset=data, callbacks=[GeneCallback(save=save)]
        ).train(**resume)

    net = plg.auxiliary(Classifier(), TLEG())
    run(net)
    folders = [tmp_path / "checkpoint-4", tmp_path]
    assert all((folder / "gene.safetensors").is_file() == save for folder in folders)
    for folder in folders if save else []:
        assert same_tensors(plg.Learngene.from_pretrained(folder).descend(model=Classifier()), net)


def test_a_plain_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(plg.bake(bert()), tmp_path, callback=GeneCallback(log=()))
    with pytest.raises(MethodError, match=r"model: expected a gene-backed network .* got a plain BertForSequence"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(("log", "got"), [(["norm", "loss"], "'loss'"), ("norm", "'norm'")])
def test_what_can_be_logged(log: Any, got: str) -> None:
    with pytest.raises(ArgumentError, match=f"log: expected some of norm, grad_norm, coeffs in a sequence, got {got}"):
        GeneCallback(log=log)


def test_other_events_pass_and_other_names_do_not() -> None:
    callback = GeneCallback()
    assert callback.on_some_event_of_a_later_version(1, 2, 3, model=None) is None
    with pytest.raises(AttributeError, match="'GeneCallback' object has no attribute 'state'"):
        callback.state()


def test_the_class_needs_no_transformers() -> None:
    program = "import sys; sys.modules['transformers'] = None\nimport pylearngene as plg; plg.training.GeneCallback()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
