"The one loop: schedule, exact resumption, errors, and the paper's shape."

import itertools
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from wrapperlib import training
from wrapperlib.checks import BadInput
from wrapperlib.model import GPT, Shape, read, site_names
from wrapperlib.protocols import SCALES, estimate, fine_tuning, pretraining, reverse, revival_plan
from wrapperlib.runs import Store
from wrapperlib.tasks import PRIORS, Domain, Edited, Natural, one_task
from wrapperlib.training import (
    FINE_TUNING,
    Measure,
    Momentum,
    Muon,
    NotFinite,
    Progress,
    Recipe,
    Stack,
    Trainee,
    accuracy,
    log_spaced,
    loss_of,
    optimisers,
    parts,
    pick_device,
    rate,
    seconds_per_step,
    train,
    train_stack,
)

ANSWER = dict(sequence=0.0, answer=1.0)


def test_schedule_is_the_papers():
    recipe = Recipe(steps=10_000, lr=1e-3)
    rates = [rate(recipe, s) for s in range(10_000)]
    assert max(rates) <= 1e-3 and rates[1999] == pytest.approx(1e-3, rel=1e-3)
    assert rates[999] == pytest.approx(5e-4, rel=2e-3)  # half-way through a linear warm-up of 20 %
    assert rates[-1] == pytest.approx(1e-5)
    halfway = (2000 + 9999) / 2
    assert rates[round(halfway)] == pytest.approx(1e-3 * (0.01 + 0.99 / 2), rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[2000:]))
    assert rate(Recipe(steps=1), 0) > 0 and math.isfinite(rate(Recipe(steps=2, warmup=0), 1))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 400, 10_000])
def test_measured_steps_run_from_first_to_last(steps):
    found = log_spaced(steps)
    assert found[0] == 0 and found[-1] == steps and found == sorted(set(found))
    assert all(b / a <= 2 for a, b in itertools.pairwise(found[1:]))


def test_losses_agree_with_their_definition(domain, shape):
    model = GPT(len(domain.vocabulary), domain.row_length, shape)
    ids = torch.from_numpy(Natural(domain, PRIORS["H"]).batch(5, 0, 0))
    log_p = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert loss_of(model, ids, Recipe()).item() == pytest.approx(-log_p.mean().item(), rel=1e-5)
    assert loss_of(model, ids, Recipe(**ANSWER)).item() == pytest.approx(-log_p[:, -2].mean().item(), rel=1e-5)
    both = loss_of(model, ids, Recipe(sequence=2.0, answer=3.0)).item()
    assert both == pytest.approx(-2 * log_p.mean().item() - 3 * log_p[:, -2].mean().item(), rel=1e-5)


def test_accuracy_counts_first_choices(domain, shape):
    model = GPT(len(domain.vocabulary), domain.row_length, shape)
    ids = torch.from_numpy(one_task(domain, "C", "a").batch(70, 0, 0))
    right = sum(int(model(row[None, :-2], last=True).argmax()) == int(row[-2]) for row in ids)
    assert len(parts(ids[:20])) == 1 and accuracy(model, ids) == pytest.approx(right / 70)
    assert len(parts(ids.repeat(10, 1))) > 1 and accuracy(model, ids.repeat(10, 1)) == pytest.approx(right / 70)


def test_training_learns_and_resumes_bit_for_bit(domain, shape):
    stream, recipe = one_task(domain, "T", "a"), Recipe(steps=60, lr=3e-3, batch=32, **ANSWER)
    measures = (Measure("acc", stream, n=64),)

    def fresh():
        return GPT(len(domain.vocabulary), domain.row_length, shape)

    whole, kept = fresh(), []
    log = train(whole, stream, recipe, 5, measures, save=kept.append, save_every=0)
    losses = [row["value"] for row in log if row["metric"] == "loss"]
    assert losses[-1] < 0.7 * losses[0]
    for progress in (kept[0], kept[30], kept[-1]):
        again = fresh()
        assert train(again, stream, recipe, 5, measures, resume=progress) == log
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))


@pytest.mark.parametrize("muon", [0.0, 3e-3])
def test_a_batch_in_parts_is_the_batch(domain, shape, muon, monkeypatch):
    recipe = Recipe(steps=4, lr=3e-3, muon=muon, batch=33, answer=2.0)
    models = []
    for tokens in (10**9, 100):
        monkeypatch.setattr(training, "_PART", tokens)
        models.append(GPT(len(domain.vocabulary), domain.row_length, shape))
        train(models[-1], Natural(domain, PRIORS["H"]), recipe)
    whole, portions = (dict(m.named_parameters()) for m in models)
    assert all(torch.allclose(whole[name], portions[name], atol=2e-4) for name in whole)


def test_muon_is_torchs(shape):
    ours, theirs = ([p for p in GPT(20, 10, shape).blocks.parameters() if p.dim() == 2] for _ in range(2))
    chance = torch.Generator().manual_seed(0)
    optimiser = Muon(ours, lr=0.02, weight_decay=0.1)
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs):
            q.grad = torch.randn(p.shape, generator=chance)
            p.grad = q.grad.clone()
        optimiser.step()
        peer.step()
    # the peer iterates in bfloat16, which keeps three digits
    assert all(torch.allclose(p, q, atol=2e-3) and not torch.equal(p, p * 0) for p, q in zip(ours, theirs))
    update = training._orthogonal(torch.randn(3, 8, 24, generator=chance)).float()
    assert ((torch.linalg.svdvals(update) - 1).abs() < 0.5).all()


def test_muon_trains_the_blocks_matrices_and_resumes_bit_for_bit(domain, shape):
    stream, recipe = one_task(domain, "T", "a"), Recipe(steps=30, lr=3e-3, muon=3e-3, batch=16, **ANSWER)

    def fresh():
        return GPT(len(domain.vocabulary), domain.row_length, shape)

    found = optimisers(Stack([fresh()]), recipe)
    assert len(found["muon"].param_groups[0]["params"]) == 4 * shape.blocks
    whole, kept = fresh(), []
    log = train(whole, stream, recipe, 5, save=kept.append, save_every=0)
    again = fresh()
    assert train(again, stream, recipe, 5, resume=kept[11]) == log
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))
    with pytest.raises(BadInput, match="checkpoint"):
        train(fresh(), stream, replace(recipe, muon=0.0), resume=kept[0])


def test_a_recipe_with_momentum_is_torchs_sgd_and_resumes_bit_for_bit(domain, shape):
    stream, recipe = one_task(domain, "T", "a"), Momentum(steps=20, lr=0.05, batch=16, **ANSWER)
    ours, theirs, again = (GPT(len(domain.vocabulary), domain.row_length, shape) for _ in range(3))
    kept = []
    log = train(ours, stream, recipe, 5, save=kept.append, save_every=0)
    peer = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        peer.param_groups[0]["lr"] = rate(recipe, step)
        peer.zero_grad()
        loss_of(theirs, torch.from_numpy(stream.batch(recipe.batch, 5, step)), recipe).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), recipe.clip)
        peer.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert train(again, stream, recipe, 5, resume=kept[11]) == log
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters()))


def trainees(domain, shape, n=3, **changes):
    "Models of their own, each on strings of its own."
    streams = [one_task(domain, "T", "a"), Natural(domain, PRIORS["H"]), Edited(domain, "b", 0.5)]
    models = [GPT(len(domain.vocabulary), domain.row_length, shape, seed) for seed in range(n)]
    measures = (Measure("acc", streams[0], n=32),)
    return [Trainee(m, s, seed, measures, **changes) for m, s, seed in zip(models, streams, range(n))]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "loss",
    [ANSWER, dict(answer=4.0), dict(muon=1e-3), dict(momentum=0.9)],
    ids=["answer", "sequence", "muon", "momentum"],
)
def test_a_stack_is_the_loop(domain, shape, loss):
    "Twenty steps of three models as one program, and of each alone, in float64 where rounding cannot hide a mistake."
    recipe = (Momentum if "momentum" in loss else Recipe)(steps=20, lr=1e-3, batch=12, clip=0.3, **loss)
    alone, together = trainees(domain, shape), trainees(domain, shape)
    for t in (*alone, *together):
        t.model.double()
    logs = [train(t.model, t.stream, recipe, t.seed, t.measures) for t in alone]
    assert [[r["step"] for r in log] for log in train_stack(together, recipe)] == [
        [r["step"] for r in log] for log in logs
    ]
    for a, b in zip(alone, together):
        for p, q in zip(a.model.parameters(), b.model.parameters()):
            assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_stack_resumes_and_its_models_can_go_on_alone(domain, shape):
    recipe, kept = Recipe(steps=12, lr=1e-3, batch=8, **ANSWER), []
    whole = trainees(domain, shape)
    logs = train_stack(whole, recipe, save=kept.append, save_every=0)
    again = [replace(t, resume=p) for t, p in zip(trainees(domain, shape), kept[4])]
    assert train_stack(again, recipe) == logs
    for a, b in zip(whole, again):
        assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    alone = trainees(domain, shape)[2]
    train(alone.model, alone.stream, recipe, alone.seed, alone.measures, resume=kept[4][2])
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(whole[2].model.parameters(), alone.model.parameters()))
    mixed = [replace(t, resume=p) for t, p in zip(trainees(domain, shape), (kept[4][0], kept[5][1], kept[5][2]))]
    with pytest.raises(BadInput, match="checkpoints of the same step"):
        train_stack(mixed, recipe)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_loss_that_is_not_finite_in_a_stack_says_whose(domain, shape):
    broken = trainees(domain, shape)
    with torch.no_grad():
        broken[1].model.head.weight[0] = math.inf
    with pytest.raises(NotFinite, match="step 1 of 5") as caught:
        train_stack(broken, Recipe(steps=5, batch=4))
    assert caught.value.which == 1


def test_mixed_precision_learns(domain, shape, monkeypatch):
    "The path CUDA takes, on a CPU: a cast copy of the weights that outlives a step would leave the loss where it was."
    cast = []

    def autocast(device):
        cast.append(device)
        return torch.autocast("cpu", torch.bfloat16)

    monkeypatch.setattr(training, "_autocast", autocast)
    stream, recipe = one_task(domain, "T", "a"), Recipe(steps=60, lr=3e-3, batch=32, **ANSWER)
    model = GPT(len(domain.vocabulary), domain.row_length, shape)
    log = train(model, stream, recipe, 5, (Measure("acc", stream, n=64),))
    losses = [row["value"] for row in log if row["metric"] == "loss"]
    assert losses[-1] < 0.7 * losses[0] and len(cast) > 60
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_model_that_a_checkpoint_could_not_hold_is_refused_before_it_is_trained(domain, shape):
    stream, recipe = one_task(domain, "T", "a"), Recipe(steps=3, batch=4, **ANSWER)
    tied, buffered = (GPT(len(domain.vocabulary), domain.row_length, shape) for _ in range(2))
    tied.head.weight = tied.token.weight
    buffered.register_buffer("mask", torch.ones(3))
    for model in (tied, buffered):
        with pytest.raises(BadInput, match=r"model is 'GPT'; allowed: .* no tied weights, no persistent buffers"):
            train(model, stream, recipe)
    buffered.register_buffer("mask", torch.ones(3), persistent=False)
    train(buffered, stream, recipe)


def test_a_foreign_checkpoint_is_refused(domain, shape):
    stream, recipe, kept = one_task(domain, "T", "a"), Recipe(steps=3, batch=4, **ANSWER), []
    train(GPT(len(domain.vocabulary), domain.row_length, shape), stream, recipe, save=kept.append, save_every=0)
    for other in (Shape(3, 2, 16), Shape(2, 2, 32)):
        with pytest.raises(BadInput, match="checkpoint"):
            train(GPT(len(domain.vocabulary), domain.row_length, other), stream, recipe, resume=kept[0])
    with pytest.raises(BadInput, match="checkpoint is '0 tensors'"):
        train(GPT(len(domain.vocabulary), domain.row_length, shape), stream, recipe, resume=Progress(1, {}, []))


def test_a_loss_that_is_not_finite_names_its_step(domain, shape):
    class Broken:
        def __init__(self, stream, model):
            self.stream, self.model = stream, model

        def batch(self, n, seed, step):
            if step == 4:
                with torch.no_grad():
                    self.model.head.weight[3] = math.nan
            return self.stream.batch(n, seed, step)

    model = GPT(len(domain.vocabulary), domain.row_length, shape)
    with pytest.raises(NotFinite, match="step 5 of 20"):
        train(model, Broken(one_task(domain, "C", "a"), model), Recipe(steps=20, batch=4, **ANSWER))


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("batch", 0),
        ("steps", 2.5),
        ("batch", 1.5),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -1.0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("warmup", 1.0),
        ("floor", 2.0),
        ("clip", 0.0),
        ("muon", -1.0),
        ("answer", -1.0),
    ],
)
def test_bad_recipes_are_named(field, value):
    with pytest.raises(BadInput, match=f"{field} is"):
        replace(Recipe(), **{field: value})
    with pytest.raises(BadInput, match="momentum is 1"):
        Momentum(momentum=1.0)
    with pytest.raises(BadInput, match="answer is 0"):
        Recipe(sequence=0.0, answer=0.0)


def test_devices():
    assert pick_device("device", "cpu") == "cpu"
    assert pick_device("device", "auto") in ("cpu", "cuda")
    for bad in ("cuda:77", "tpu", 3, True):
        with pytest.raises(BadInput, match="device is"):
            pick_device("device", bad)


def test_one_pretraining_and_one_fine_tuning_step_at_the_papers_full_shape():
    paper = SCALES["paper"]
    assert (paper.domain, paper.shape, paper.pretraining.steps, paper.fine_tuning) == (
        Domain(),
        Shape(6, 6, 192),
        200_000,
        FINE_TUNING,
    )
    base = pretraining(paper, "H")
    model = base.fresh_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for run in (base, fine_tuning(paper, base, 1.0), reverse(paper, base)):
        one = replace(run.recipe, steps=1)
        log = train(model, run.stream, one, seed=0)
        assert math.isfinite(log[-1]["value"])
        assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
        before = {name: p.clone() for name, p in model.named_parameters()}


def test_the_cost_of_a_step_is_measured(domain, shape, monkeypatch):
    "By a clock that goes on by three seconds a step."
    clock = SimpleNamespace(perf_counter=iter(range(0, 1000, 3)).__next__, monotonic=time.monotonic)
    monkeypatch.setattr(training, "time", clock)
    model = GPT(len(domain.vocabulary), domain.row_length, shape)
    assert seconds_per_step(model, one_task(domain, "C", "a"), Recipe(batch=4, **ANSWER), steps=5) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
def test_cuda_trains_like_the_cpu(domain, shape, last):
    "bf16 autocast and compilation: the same fall of the loss within a tolerance, and no step is skipped."
    stream = one_task(domain, "T", "a")
    recipe = Recipe(steps=60, lr=3e-3, batch=32, sequence=0.0 if last else 1.0, answer=1.0)
    logs = {}
    for device in ("cpu", "cuda"):
        model = GPT(len(domain.vocabulary), domain.row_length, shape)
        log = train(model, stream, recipe, 5, (Measure("acc", stream, n=64),), device=device)
        logs[device] = [row["value"] for row in log if row["metric"] == "loss"]
    assert len(logs["cpu"]) == len(logs["cuda"])
    assert logs["cuda"] == pytest.approx(logs["cpu"], rel=0.05, abs=0.05)


@pytest.mark.gpu
def test_cuda_resumes(domain, shape):
    stream, recipe, kept = one_task(domain, "T", "a"), Recipe(steps=60, lr=3e-3, batch=32, **ANSWER), []
    whole = train(
        GPT(len(domain.vocabulary), domain.row_length, shape),
        stream,
        recipe,
        device="cuda",
        save=kept.append,
        save_every=0,
    )
    again = train(GPT(len(domain.vocabulary), domain.row_length, shape), stream, recipe, device="cuda", resume=kept[30])
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    assert again[-1]["value"] == pytest.approx(whole[-1]["value"], rel=0.05, abs=0.05)


@pytest.mark.gpu
def test_sites_read_the_same_on_cuda(domain, shape):
    model = GPT(len(domain.vocabulary), domain.row_length, shape).eval()
    ids = torch.from_numpy(Natural(domain, PRIORS["H"]).batch(4, 0, 0))
    ours = read(model, ids, site_names(model))
    theirs = read(model.cuda(), ids.cuda(), site_names(model))
    assert all(torch.allclose(ours[name], theirs[name].cpu(), atol=1e-4) for name in ours)


@pytest.mark.gpu
def test_a_stack_outruns_its_models_on_cuda(tmp_path, capsys):
    "Eight fine-tunings at the paper's shape as one program against one after another, and what the paper's whole revival grid costs."
    scale, steps = SCALES["paper"], 30
    runs_ = [fine_tuning(scale, pretraining(scale, "H", seed), 1.0) for seed in range(8)]
    recipe = replace(runs_[0].recipe, steps=steps)

    def seconds(groups):
        began = None
        for group in groups:
            done = []

            def stamp(step, done=done):
                torch.cuda.synchronize()
                done.append(time.perf_counter())

            some = [Trainee(run.fresh_model(), run.stream, (run.seed, run.data)) for run in group]
            train_stack(some, recipe, "cuda", report=stamp)
            began = (began or 0) + done[-1] - done[9]  # compilation is over by then
        return began

    alone, together = seconds([[run] for run in runs_]), seconds([runs_])
    hours = estimate(Store(tmp_path), revival_plan(scale, seeds=3), "cuda")
    with capsys.disabled():
        print(
            f"\none program of 8: {alone / together:.2f} times as fast; the revival grid with 3 seeds: {hours:.0f} GPU hours one by one"
        )
    assert alone > together
