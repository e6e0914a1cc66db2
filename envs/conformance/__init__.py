"""The conformance kit: what every environment must do, one rule at a time.

    findings = await check(lambda: MyEnv(option=1))

An empty list means that the environment is fit for training. `RULES` names the rules, their
docstrings say what they ask for; each finding carries the rule's name, the task and what was seen.
"""

from loopwright.envs.conformance.examination import RULES, Figures, Report, check, examine, explain
from loopwright.envs.conformance.kit import Finding, Kit

__all__ = ["RULES", "Figures", "Finding", "Kit", "Report", "check", "examine", "explain"]
