"""What can go wrong, as one small tree.

BlackboxError
├── InputError            the data, a setting or a file is not what was wanted; nothing was spent
├── RunMismatch           a run directory belongs to another run than the one asked for
├── BudgetError           the budget cannot pay for what is asked
├── StorageError          the ledger or a run's file cannot be read or written; no query leaves
├── Interrupted           stopped on request; everything settled is kept, the run resumes
└── BackendError          the endpoint, as the caller sees it
    ├── NotSent           the request never reached it: refunded, may be sent again
    ├── Refused           a complete answer that says no (4xx): refunded where refusals are free
    │   ├── RateLimited   not now: may be sent again, later
    │   ├── AuthError     the key was refused: stop at once
    │   └── QuotaError    the account has no credit left: stop at once
    ├── UnknownOutcome    sent, and the answer was lost: charged
    └── ContractError     answered, but not what it declares (shape, NaN, label): charged
        └── ModelChanged  another model answered: stop at once

A message says what was got, what was wanted and what to do. `exit_code` is what the command line
returns for the error.
"""

from __future__ import annotations


class BlackboxError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class InputError(BlackboxError, ValueError):
    """The data, a setting or a file is not what was wanted. Raised before a query is spent."""

    exit_code = 2


class RunMismatch(InputError):
    """The run directory holds another run: its seed, data, model or settings differ."""


class BudgetError(BlackboxError):
    """The budget cannot pay for what is asked; nothing was sent."""

    exit_code = 3


class BackendError(BlackboxError):
    """The endpoint failed, as the caller sees it.

    Args:
        message: what was got, what was wanted, what to do.
        retry_after: seconds after which the endpoint asks to be tried again; None if it said
            nothing.
        final: whether sending the request again cannot help.
    """

    exit_code = 4

    def __init__(
        self, message: str, *, retry_after: float | None = None, final: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.final = final


class NotSent(BackendError):
    """The request never reached the endpoint: it is refunded and may be sent again."""


class Refused(BackendError):
    """The endpoint answered that it will not serve the request."""


class RateLimited(Refused):
    """The endpoint answered that it will not serve the request now."""


class AuthError(Refused):
    """The endpoint refused the key: the run stops at once and can be resumed."""

    exit_code = 5


class QuotaError(Refused):
    """The account behind the key may spend no more: the run stops at once and can be resumed."""

    exit_code = 7


class UnknownOutcome(BackendError):
    """The request was sent and its answer was lost: it stays charged."""


class ContractError(BackendError):
    """The endpoint answered something else than it declares."""


class ModelChanged(ContractError):
    """Another model answered than the one that was asked: the scores are not comparable."""


class StorageError(BlackboxError):
    """The ledger or a file of the run cannot be read or written: no query leaves."""

    exit_code = 6


class Interrupted(BlackboxError):
    """Stopped on request. Everything settled is kept; the run can be resumed."""

    exit_code = 130
