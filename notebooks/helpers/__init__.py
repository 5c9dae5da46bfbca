"""What the notebooks import. The files, in the order in which the data flows:

snapshots (rows, folders, the call log) -> calls (the LLM in front of it, stages) -> datasets (generate) -> judging (judge)
-> student, finetuning (fine-tune) -> metrics, report (evaluate). Imports only ever point back up this list.
"""

from .calls import CallFailed, Collected, MissingCall, fill, run_stage
from .datasets import (SnapshotReader, answer_questions, clean_question, deal, generate_questions, local_embedding, save_qrd)
from .finetuning import LocalFinetuneEngine, check_events, count_tokens, finetuning_events, save_events, training_cost
from .judging import judge_rows, read_score
from .metrics import clusters_of, compare_students, correctness_report, scores_of
from .report import invalid_judgements, plot_judges, plot_scores, versions, with_intervals
from .snapshots import (CallLog, DamagedFile, judge_mode, load_rows, output_folder, save_rows, snapshot_folder)
from .student import LocalJudge, Student, distillation_loss, embed, items_of, read_prompt, untrained_judges
