"""Speculative decoding: something cheap guesses, the target checks all guesses in one call.

``tree`` holds drafts and the calls that check them, ``verify`` the target's side of the check,
``rejection`` and ``kseq`` the rules that keep the target's distribution, ``budget`` decides how
much to draft. A strategy is a guesser plus these.
"""
