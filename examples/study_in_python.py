"""A study in twenty lines: search the settings of a defence, look at the trials as a table.

python examples/study_in_python.py
"""

from common import backdoored

import study

if __name__ == "__main__":
    victim = backdoored()
    trials = study.run(
        {
            "name": "example",
            "defence": "clp",
            "trials": 6,
            "victims": [victim.spec.model_dump(exclude_defaults=True)],
            "reference_point": {"clean_accuracy": 0.5, "attack_success": 1.0},
        }
    )
    shown = ["number", "status", "parameters.u", "clean_accuracy", "attack_success", "risk"]
    print(trials[shown].sort_values("attack_success").to_string(index=False))
