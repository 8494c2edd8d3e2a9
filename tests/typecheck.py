"""The checker of the jaxtyping hook: beartype, with ints where floats are asked for, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
