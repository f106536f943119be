"""Completions, real ones and awkward ones, with what is read from them: (completion, by the authors' rule, by ours)."""

NUMBERS = [
    ("The answer is 576.", 576, 576),
    ("She has 1,234.5 left.", 1234.5, 1234.5),
    ("10-3=7", 7, 7),
    ("7=10-3", -3, 3),  # the authors take the minus for a sign
    ("so 3/4 of it", 4, 0.75),
    ("3/4 = 0.75", 0.75, 0.75),
    ("about .5 litres", 5, 0.5),
    ("1e-3", -3, 0.001),
    ("2.5e3 metres", 3, 2500),
    ("it fell by -7 degrees", -7, -7),
    ("The answer is -$110.", 110, -110),
    ("$ 5.00", 5, 5),
    ("5 apples, 6 pears, 7 plums", 7, 7),
    ("no number at all", None, None),
    ("", None, None),
    ("9/0", 0, None),
    ("The answer is 1 1/2.", 2, 1.5),
    ("in 2010 3/4 of them", 4, 0.75),
    (r"\frac{3}{4}", 4, 0.75),
    (r"-2\frac{1}{2}", 2, -2.5),
    ("5*10^3", 3, 5000),
    (r"3 \times 10^{-2} m", -2, 0.03),
    ("2 x 10 = 20", 20, 20),
    ("The answer is 12.\n\n### Response:\n13", 12, 12),  # ran on into the next response
    ("The answer is 12.\n\n### Instruction:\nAdd 7.", 7, 12),  # the authors split at "### Response:" only
    ("Therefore, Martha ends up with 79 cards.", 79, 79),
]

LETTERS = [
    ("The answer is (B).", "B", "B"),
    ("Assume x = 4. The answer is (B).", "A", "B"),
    ("Therefore, the answer is option E) 8800.", "E", "E"),
    ("B", "B", "B"),
    ("A", "A", "A"),
    ("A train leaves.", "A", None),
    ("Choices: A) 1 B) 2. The correct option is C", "C", "C"),
    ("The answer is a bit unclear", None, None),
    ("Cost is 5, so D.", "C", "D"),
    ("so the answer is A) 367 and not B", "A", "A"),
    ("The answer in arabic numerals is 770. Distance", "D", None),
    ("nothing here", None, None),
    ("The answer is D, since option A is too small.", "D", "D"),
    ("The answer is (D). The other choice B is too big.", "D", "D"),
    ("The correct answer is therefore D, not B.", "D", "D"),
    ("the answer is not A", "A", None),
    ("It is not (B) but (C)", "B", "C"),
    ("it is (C), not (B)", "C", "C"),
    ("answer choice (E)", "E", "E"),
    ("The answer is B. No: the answer is C, for B is odd.", "B", "C"),  # the last of each kind
    ("First option B, then option D, not C", "B", "D"),
    ("B or D", "B", "D"),
    ("(B), I think.\n\n### Response:\n(C)", "B", "B"),  # the authors: the first, of letters
]

OPTIONS = [
    ("the correct answer is solution2", "solution2", "solution2"),
    ("solution1 is wrong; the correct answer is solution2", "solution1", "solution2"),
    ("Solution2", None, "solution2"),
    ("The correct answer is Solution 1.", None, "solution1"),
    ("the answer is solution1 or solution2", "solution1", None),
    ("solution1, because solution2 makes no sense", "solution1", "solution1"),
    ("solution1/solution2", "solution1", None),
    ("I prefer solution1 to solution2", "solution1", None),
    ("It is not solution1 but solution2", "solution1", "solution2"),
    ("solution11", "solution1", None),
    ("resolution1", "solution1", None),
    (
        "the correct answer is solution1\n\n### Response:\nsolution2",
        "solution2",
        "solution1",
    ),  # the authors: the last
    ("**Answer:** `solution2`", "solution2", "solution2"),
    (
        "The answer to the question is solution1.\n\nThe answer to the question is solution2.",
        "solution1",
        "solution2",
    ),
    ("", None, None),
]

TRUTHS = [
    ("the correct answer is false", "false", "false"),
    ("It is untrue", "true", None),
    ("True", None, "true"),
    ("the answer is not true", "true", None),
    ("That isn't true, so false", "true", "false"),
    # SmolLM2's own
    ('The answer to the question "Is there a word with q without u?" is "true/false"', "true", None),
    ('The answer to the question "is true grit a remake" is "true".', "true", "true"),
    ("yes", None, None),
]

# The `output` column of the test files, all that are here: completions of an old model for arithmetic (none for mawps), and
# "the correct answer is ..." for commonsense. By the authors' rule and by ours.
STORED = {
    "gsm8k": (771, 771, 1319),
    "aqua": (109, 123, 254),
    "addsub": (370, 370, 395),
    "svamp": (803, 803, 1000),
    "mawps": (0, 0, 238),
    "boolq": (3270, 3270, 3270),
    "piqa": (1838, 1838, 1838),
    "winogrande": (1267, 1267, 1267),
    "arc-c": (1172, 1172, 1172),
}
