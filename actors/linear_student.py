"""How a worker makes the trainer of a linear student: from a teacher's stored run and configuration."""

from dataclasses import dataclass

from actors.recipe import load_unet
from actors.worker import Report
from cluster.storage import RunStore
from counterpoint.data import DataConfig, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.linear_student import Conversion, LinearStudentConfig, LinearStudentTrainer, linearize
from counterpoint.place import Place
from counterpoint.seeds import seed_of


@dataclass(frozen=True)
class LinearStudentRecipe:
    """What a linear student's trainer is made of; call it in a worker."""

    teacher: str
    """URI of the teacher's run."""
    data: DataConfig
    noise: NoiseConfig
    student: LinearStudentConfig
    seed: int
    accumulate: int = 1

    def __call__(self, place: Place, store: RunStore, report: Report) -> LinearStudentTrainer:
        """Build this rank's trainer."""
        return LinearStudentTrainer(
            self.conversion().student, load_unet(self.teacher), build_noise_scheduler(self.noise),
            load_data(self.data).train, self.student, self.seed, place, self.accumulate,
        )  # fmt: skip

    def conversion(self) -> Conversion:
        """Return the student as it begins, and what it has of the teacher."""
        config = self.student
        return linearize(
            load_unet(self.teacher), config.heads, config.kernel_size, config.inherit, config.attention,
            seed_of(self.seed, "student"),
        )  # fmt: skip
