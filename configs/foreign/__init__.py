"""Settings of other distillation programs as a recipe: a module for each."""

from configs.errors import ConfigError
from configs.foreign.kdflow_flags import KDFLOW
from configs.foreign.programs import Flags, Imported, made
from configs.foreign.trl_gkd import TRL

PROGRAMS = (KDFLOW, TRL)


def imported(settings: Flags) -> Imported:
    """A recipe that trains as the settings do, as far as there is a name for them here. Raises
    ConfigError for settings of neither program.
    """
    for program in PROGRAMS:
        if program.marks & settings.keys():
            return made(program, settings)
    marks = " or ".join(sorted(mark for program in PROGRAMS for mark in program.marks))
    raise ConfigError(f"these are no settings of KDFlow, nor of TRL's GKD: none of them is {marks}")
