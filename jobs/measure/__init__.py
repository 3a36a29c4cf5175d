"""Commands that measure speed, quality and robustness; `jobs/results` has what they measured."""
