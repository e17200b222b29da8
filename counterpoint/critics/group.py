"""A critic group: the heads of one noise level, with all that they need to judge, learn and be renewed.

One message in (`Samples`), one verdict out (`Verdict`): samples and gradients cross, features never do. The
class knows nothing of where it runs; an actor around it adds only transport and recovery.
"""

import itertools

import torch
from torch import Tensor

from counterpoint.critics.bank import HeadBank, build_banks, digest
from counterpoint.critics.encoder import Encoder
from counterpoint.critics.lesson import Lesson
from counterpoint.critics.messages import Samples, Verdict
from counterpoint.critics.pool import Pool
from counterpoint.critics.replicas import Contribution, Replication
from counterpoint.critics.seats import Seats, student_gradient
from counterpoint.critics.views import Features, Look, draw_looks, draw_wrong_labels, look_at

__all__ = ["CriticGroup", "Samples", "Verdict"]


class CriticGroup:
    """The heads at one noise level, their encoder, optimizer and refresh."""

    def __init__(self, pool: Pool, index: int, encoder: Encoder, alphas_cumprod: Tensor) -> None:
        self.pool = pool
        if pool.config.shuffled_negatives and encoder.null_class < 2:
            raise ValueError("critics.shuffled_negatives=true needs a second class to show: set it to false")
        self.index = index
        self.encoder = encoder
        self.timestep = pool.timesteps[index]
        self.alphas_cumprod = alphas_cumprod
        self.ticks = 0
        """Ticks of the refresh clock that have been applied."""
        self.replication: Replication | None = None
        """This group's place among replicas that learn as one; alone unless set."""
        self.banks = build_banks(pool, index, encoder.conv_in.weight.device)
        self._home = {slot: (bank, i) for bank in self.banks for i, slot in enumerate(bank.slots)}
        self._lesson: Lesson | None = None
        self._refreshed = 0

    def judge(self, samples: Samples) -> Verdict:
        """Learn from the samples, judge the fake ones, and renew whoever's time has come.

        The fake samples pass the encoder once: the graph serves the student's gradient, detached features the
        heads' loss. `critics_first` judges with the updated heads, `student_first` with those before.

        Raises ValueError for samples that do not continue the step that has begun, and for an accumulated
        step that would have to be judged by heads that have not learned yet.
        """
        config = self.pool.config
        self._check(samples)
        self._advance(self._tick(samples), samples.micros)
        lesson = self._lesson_of(samples)
        images = samples.fake.detach().requires_grad_(samples.judge)
        fake, real, negative = self._views(samples, images)
        loss, gradient, voting = 0.0, None, 0
        if samples.judge and config.order == "student_first":
            loss, gradient, voting = student_gradient(lesson.panel, config, fake, images)
        told = self._exchanged(samples, lesson, lesson.add(config.loss, real, fake, negative))
        if samples.last:
            lesson.finish(told.gradients, told.learned, self.pool.progress(samples.step))
        if samples.judge and config.order == "critics_first":
            loss, gradient, voting = student_gradient(lesson.panel, config, fake, images)
        if samples.last:
            self._lesson = None
            self._advance(self._tick(samples) + 1, samples.micros)
        weights = self.pool.band_weights(samples.step)
        if weights:
            loss *= weights[self.index]
            gradient = None if gradient is None else gradient * weights[self.index]
        refreshed, self._refreshed = self._refreshed, 0
        return Verdict(
            step=samples.step,
            loss=loss,
            gradient=gradient,
            critic_loss=told.critic_loss,
            real_logits=told.real_logits,
            fake_logits=told.fake_logits,
            samples=len(samples.fake),
            refreshed=refreshed,
            voting=voting,
        )

    def logits(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Return the logits [n, heads] of every head of the group on images [n,C,H,W]; nothing changes.

        The noise and the windows come from the stream of `step`; heads are ordered by bank and row.
        """
        look, _ = draw_looks(self.pool.config, self.pool.seed, ("probe", step, self.index), images)
        everyone = [self._seats(bank, list(range(len(bank.rows)))) for bank in self.banks]
        with torch.no_grad():
            features = self._look_at(images, labels, look)
            return torch.cat([seats.logits(seats.weights(), features) for seats in everyone], dim=1)

    def state(self) -> dict[str, Tensor]:
        """Return the group's whole state as named CPU tensors; exact between accumulated steps."""
        state = {"ticks": torch.tensor(self.ticks)}
        for i, bank in enumerate(self.banks):
            state |= {f"bank{i}.{name}": tensor for name, tensor in bank.state().items()}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Return to a stored state; what was accumulated since is dropped."""
        for i, bank in enumerate(self.banks):
            prefix = f"bank{i}."
            bank.load({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.ticks = int(state["ticks"])
        self._lesson, self._refreshed = None, 0

    def digest(self) -> str:
        """Return a short fingerprint of all heads' weights and generations, equal wherever they are equal."""
        return digest(self.banks)

    def ages(self) -> Tensor:
        """Return the age of every head in ticks, int64 [heads], by bank and row."""
        return torch.cat([self.ticks - bank.born for bank in self.banks])

    def _check(self, samples: Samples) -> None:
        if self.pool.config.order == "critics_first" and samples.micros > 1 and samples.judge:
            raise ValueError(
                f"critics.order=critics_first cannot judge before the last of {samples.micros} micro-batches "
                "has taught the heads: set critics.order=student_first or trainer.accumulate=1"
            )

    def _exchanged(
        self, samples: Samples, lesson: Lesson, said: tuple[float, Tensor, Tensor]
    ) -> Contribution:
        """Return what all replicas learned from the micro-batch, of which `said` is this one's part."""
        gradients = tuple(lesson.gradients) if samples.last else ()
        mine = Contribution(len(samples.fake), lesson.samples, *said, gradients)
        if self.replication is None:
            return mine
        return self.replication.exchange((samples.step, samples.micro), mine)

    def _part(self, samples: Samples) -> tuple[int, int]:
        """Return which of how many parts of the whole step these samples are, all replicas' counted."""
        if self.replication is None:
            return samples.micro, samples.micros
        index, count = self.replication.index, self.replication.count
        # A micro-batch lies in one piece, cut by rank: see `counterpoint.optimization.rank_slices`.
        return samples.micro * count + index, samples.micros * count

    def _views(self, samples: Samples, images: Tensor) -> tuple[Features, Features, Features | None]:
        """Return the features of fake `images`, of real ones and, if wanted, of those under a wrong class."""
        config, seed, name = self.pool.config, self.pool.seed, (samples.step, self.index)
        part = self._part(samples)
        fake_look, real_look = draw_looks(config, seed, name, images, *part)
        fake = self._look_at(images, samples.labels, fake_look)
        negative = None
        with torch.no_grad():
            real = self._look_at(samples.real, samples.labels, real_look)
            if config.shuffled_negatives:
                wrong = draw_wrong_labels(seed, name, samples.labels, self.encoder.null_class, *part)
                negative = self._look_at(samples.real, wrong, real_look)
        return fake, real, negative

    def _look_at(self, images: Tensor, labels: Tensor, look: Look) -> Features:
        return look_at(
            self.encoder, self.pool.config, images, labels, look, self.timestep, self.alphas_cumprod
        )

    def _lesson_of(self, samples: Samples) -> Lesson:
        """Return the lesson that these samples belong to, a new one if they begin a step."""
        lesson = self._lesson
        if samples.micro == 0 or lesson is None:
            lesson = self._lesson = Lesson(self._panel(samples.step), samples.step, self.pool.levels)
        lesson.check(samples)
        return lesson

    def _panel(self, step: int) -> list[Seats]:
        """Return the seats of the heads that judge at `step`; banks of which none does are left out."""
        chosen = set(self.pool.panel(step, self.index))
        panel = []
        for bank in self.banks:
            everyone = itertools.product(bank.slots, range(self.pool.config.heads_per_slot))
            rows = [row for row, head in enumerate(everyone) if head in chosen]
            if rows:
                panel.append(self._seats(bank, rows))
        return panel

    def _seats(self, bank: HeadBank, rows: list[int]) -> Seats:
        spares = self.pool.config.heads_per_slot
        everyone = len(rows) == len(bank.rows)
        slots = bank.slots if everyone else [bank.slots[row // spares] for row in rows]
        return Seats(bank, rows, [self.pool.slots[slot] for slot in slots])

    def _tick(self, samples: Samples) -> int:
        if self.pool.config.refresh_clock == "micro_step":
            return samples.step * samples.micros + samples.micro
        return samples.step

    def _advance(self, ticks: int, micros: int = 1) -> None:
        """Apply the refreshes up to tick `ticks`; a group that missed steps makes good for them here."""
        first = self.index * self.pool.heads_per_group
        per_step = micros if self.pool.config.refresh_clock == "micro_step" else 1
        while self.ticks < ticks:
            for head in self.pool.refreshed(self.ticks, per_step):
                if first <= head < first + self.pool.heads_per_group:
                    self._renew(head, head - first)
            self.ticks += 1

    def _renew(self, head: int, local: int) -> None:
        spares = self.pool.config.heads_per_slot
        bank, position = self._home[local // spares]
        row = position * spares + local % spares
        generation = int(bank.generations[row]) + 1
        bank.renew(row, self.pool.initial_head(head, generation), generation, self.ticks)
        if self._lesson is not None:
            self._lesson.forget(bank, row)
        self._refreshed += 1
