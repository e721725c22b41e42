"""Teachers on every backbone: training, files, and sizes that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidmlp.data import Interactions, TokenSpec, leave_last_out
from sidmlp.evaluate import Quality, Questions, by_popularity, by_teacher
from sidmlp.teacher import (
    CausalConfig,
    CausalTeacher,
    Teacher,
    TeacherConfig,
    make_teacher,
    read_teacher,
    write_teacher,
)
from sidmlp.teacher.train import train_teacher
from sidmlp.training import Execution, LoopOptions, load_tensors, save_tensors

SIZES = (4, 3, 3)
TOKENS = TokenSpec.for_codes(SIZES, max_items=4)


def walks(users: int = 240, items: int = 120) -> Interactions:
    """Everybody walks round the same circle, one or two steps at a time."""
    rng = np.random.default_rng(0)
    lists = [
        (rng.integers(items) + np.cumsum(rng.integers(1, 3, 10))) % items for _ in range(users)
    ]
    return Interactions(
        np.concatenate(lists), np.arange(users + 1) * 10, np.arange(items, dtype=np.int64)
    )


class TestTraining:
    @pytest.mark.parametrize("backbone", ["qwen3", "llama"])
    def test_learns_and_beats_popularity(self, backbone):
        data = walks()
        split, codes = leave_last_out(data), np.stack(np.divmod(np.arange(120), 12), axis=1)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8}
        teacher = make_teacher(
            backbone, TokenSpec.for_codes((10, 12), 4), **sizes, ffn_dim=64, num_kv_heads=2
        )
        options = LoopOptions(epochs=4, batch_size=64, learning_rate=1e-2, warmup_steps=10)
        result = train_teacher(
            teacher, split, codes, options, targets_per_history=2, progress=False
        )
        losses = [record["loss"] for record in result.history]
        assert losses[-1] < 0.6 * losses[0]
        questions = Questions.of(split.test)
        popular = Quality.of(by_popularity(data, split, questions), questions.targets)
        found = Quality.of(by_teacher(teacher, codes, questions).items, questions.targets)
        # Two steps are possible: a perfect model has Recall@5 1, and NDCG@10 about 0.8.
        assert found.recall_5 > 0.9 > popular.recall_5
        assert found.ndcg_10 > 0.6 > popular.ndcg_10

    @pytest.mark.parametrize("backbone", ["qwen3", "llama"])
    def test_on_a_gpu_steps_are_graphs_in_bfloat16(self, backbone, cuda):
        split, grid = leave_last_out(walks()), np.stack(np.divmod(np.arange(120), 12), axis=1)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8}
        spec = TokenSpec.for_codes((10, 12), 4)
        learner = make_teacher(backbone, spec, **sizes, ffn_dim=64, num_kv_heads=2)
        options = LoopOptions(epochs=6, batch_size=64, learning_rate=1e-2, warmup_steps=10)
        run = Execution(cuda, "bf16")
        result = train_teacher(learner, split, grid, options, execution=run, progress=False)
        losses = [record["loss"] for record in result.history]
        assert losses[-1] < 0.7 * losses[0]

    def test_resumed_equals_uninterrupted(self, tmp_path):
        split, codes = leave_last_out(walks(40, 20)), np.stack(np.divmod(np.arange(20), 5), axis=1)

        spec, options = TokenSpec.for_codes((4, 5), 4), LoopOptions(epochs=2, batch_size=64)

        def train(stop_at: int | None = None) -> CausalTeacher:
            torch.manual_seed(0)
            config = CausalConfig(dim=8, num_layers=1, num_heads=2, head_dim=4, ffn_dim=16)
            model, calls = CausalTeacher(config, spec), 0
            begin = model.begin

            def interrupted(ids: Tensor, mask: Tensor) -> Any:
                nonlocal calls
                calls += 1
                if calls == stop_at:
                    raise KeyboardInterrupt
                return begin(ids, mask)

            model.begin = interrupted  # type: ignore[method-assign]
            state = None if stop_at is None else tmp_path / "state.pt"
            train_teacher(model, split, codes, options, state_file=state, progress=False)
            return model

        straight = train()
        with pytest.raises(KeyboardInterrupt):
            train(stop_at=7)
        assert load_tensors(tmp_path / "state.pt")["result"]["epochs"] == 1
        resumed = train(stop_at=-1)
        for name, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


class TestFiles:
    @pytest.mark.parametrize("backbone", ["t5", "qwen3", "llama"])
    def test_come_back_as_they_were(self, backbone, tmp_path):
        torch.manual_seed(1)
        sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "ffn_dim": 16}
        made = make_teacher(backbone, TOKENS, **sizes).eval()
        write_teacher(tmp_path / "teacher.pt", made)
        read = read_teacher(tmp_path / "teacher.pt")
        assert type(read) is type(made)
        assert read.config == made.config
        assert read.tokens == TOKENS
        assert not read.training
        grid = np.stack(np.unravel_index(np.arange(20), SIZES), axis=1)
        batch = TOKENS.batch([np.arange(size) for size in range(5)], grid)
        targets = torch.from_numpy(grid[:5])[:, None]
        with torch.no_grad():
            want, got = (m.teacher_forced(*batch, targets) for m in (made, read))
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))

    def test_of_before_there_was_a_choice(self, tmp_path):
        made = Teacher(TeacherConfig(16, 1, 2, 8, 16), TOKENS)
        config = {"dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "ffn_dim": 16}
        path = tmp_path / "teacher.pt"
        save_tensors(path, {"config": config, "weights": made.state_dict()})
        assert isinstance(read_teacher(path, TOKENS), Teacher)
        with pytest.raises(ValueError, match="does not say which vocabulary"):
            read_teacher(path)

    def test_that_do_not_fit(self, tmp_path):
        path = tmp_path / "teacher.pt"
        config = CausalConfig(dim=8, num_layers=1, num_heads=2, head_dim=4, ffn_dim=16)
        write_teacher(path, CausalTeacher(config, TOKENS))
        with pytest.raises(ValueError, match=r"teacher\.pt: expected a teacher of TokenSpec"):
            read_teacher(path, TokenSpec.for_codes((4, 4, 4)))
        saved = load_tensors(path)
        del saved["weights"]["model.model.norm.weight"]
        save_tensors(path, saved)
        with pytest.raises(ValueError, match=r"does not hold a teacher.*norm\.weight"):
            read_teacher(path)
        save_tensors(path, {"other": 1})
        with pytest.raises(ValueError, match="does not hold a teacher"):
            read_teacher(path, TOKENS)
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(ValueError, match="is damaged"):
            read_teacher(path)


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"backbone": "gpt"}, "backbone: expected one of qwen3, llama, got 'gpt'"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"head_dim": 7}, "head_dim must be even, for rotary positions, got 7"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads 6, got 4"),
        ({"num_kv_heads": 0}, "num_kv_heads must divide num_heads 6, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_fit(sizes, what):
    with pytest.raises(ValueError, match=what):
        CausalConfig(**sizes)


def test_backbones_that_there_are_not():
    with pytest.raises(ValueError, match="backbone: expected one of t5, qwen3, llama, got 'gpt'"):
        make_teacher("gpt", TOKENS)
    with pytest.raises(ValueError, match="sizes that t5 has, got num_kv_heads"):
        make_teacher("t5", TOKENS, num_kv_heads=2)
