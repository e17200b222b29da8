"""`python -m waiting_distill CONFIG`: a distillation whose student waits before step 12 for the file `go`."""

from node_parts import WaitingStudent

from jobs import distill
from jobs.config import run_job
from jobs.settings import DistillConfig

if __name__ == "__main__":
    distill.StudentRecipe = WaitingStudent
    run_job(distill.main, DistillConfig)
