"""Which option an output states."""

import time

import pytest

from ola_vlm.eval.cleaning import final_answer
from ola_vlm.eval.reading import parse_choice
from ola_vlm.eval.scoring import SCORERS

BOXES = ["The left box", "The right box", "Near", "Far"]
STATED = {
    "(B)": [
        "b.",
        "**(B)**",
        "B) The right box",
        "(B) 3",
        "The answer is b.",
        "The answer is (B), not (A)",
        "Answer: B",
        "answer: b",
        "ANSWER - B",
        "### Answer\nB",
        "The correct option is most likely (b)",
        "The answer cannot be A, so it must be B",
        "I would go with option B",
        "I choose B.",
        "B is correct",
        "B is the right choice because A is left",
        "B because option A is farther",
        "(B), since (A) is behind",
        "B\n\nA is farther away",
        "A. The left box\nB. The right box\n\nAnswer: B",
        "Option A is wrong. The answer is B.",
        "Choice A can be excluded. Answer: B",
        "We can rule out A. B.",
        "It's not A, it's B.",
        "The answer is B and not A",
        "Between option A and option B, the answer is B",
        "A. No wait, the answer is B",
        "The answer is A. Wait, the answer is B.",
        "<think>Option A says left. That is not right.</think>\n\nB",
        "<THINKING>A</THINKING>(B)",
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B",
        "<answer>B</answer>",
        "<answer>The right box",
        "I see A first. \\boxed{\\text{B}}",
        '{"reasoning": "A is left", "answer": "B"}',
        "答案：B",  # noqa: RUF001 (Chinese marks)
        "正确答案是B",
        "答えはB",
        "A是错的，答案是B",  # noqa: RUF001 (Chinese marks)
        "不是A，是B",  # noqa: RUF001 (Chinese marks)
        "La respuesta es B",
        "Die Antwort ist B.",
        "Ответ: B",
        "{'answer': 'B'}",
        "The answer is 'B'.",
        "option b",
        "A, C and D are wrong. So B.",
        "A, C, and D can be eliminated, leaving B",
        "At first I thought A, but it is B.",
        "The answer is A? No, it's B.",
        "A is possible, but B is more likely",
        "No doubt it's B",
        "I choose b",
        "Verdict: B",
        "Cevap: B",
        "选项B正确",
        "답은 B입니다",
        "La risposta corretta è B",
        "La respuesta no es A, es B",
        "Die Antwort ist nicht A, sondern B",
        "Ce n'est pas A, c'est B",
        "The right box (B)",
        "The answer is A, no wait, B",
        "Answer: A\n\nActually, I made a mistake. B.",
        "People say the answer is A but they are wrong: the answer is B",
        "<solution>B</solution>",
        "<p>The answer is <strong>B</strong></p>",
        "B<|im_end|>",
        "**Option B** is the best match.",
        "- A: \u2717\n- B: \u2713\n- C: \u2717",
        "A. The left box - wrong\nB. The right box - right\nC. Near - wrong",
        "Let's see if option A is right. It is not. So B.",
        "The answer is (B) if the camera is level.",
        "The answer is B unless the picture is not upright.",
        "It's b.",
        "I guess b",
        "La respuesta es la opción B.",
        "Die richtige Antwort lautet B.",
        "the right box",
        "The left box is far. The answer is the right box.",
        "The left box is excluded. It is the right box.",
        # A letter that is taken back.
        "A... no, B.",
        "A, no, B.",
        "A? No: B",
        "A? B!",
        "A. Hmm, no. B.",
        "A, sorry, B.",
        "A, or rather B.",
        "A, I mean B.",
        "The answer is A... no, B.",
        "The answer is A. Hold on, B.",
        "A. Let me double-check. B.",
        "~~A~~ B",
        # Other people's answers, and the speaker's own.
        "Many would answer A. But it is B.",
        "You might think the answer is A, but it's B.",
        "To answer, A is farther. So B.",
        "I would answer B.",
        # Check boxes.
        "- [ ] A\n- [x] B",
        "( ) A\n(x) B",
        "❌ A\n✅ B",
        "A [ ]\nB [x]",
        # Other tags and tokens.
        "[THINK]maybe A[/THINK]B",
        "<|begin_of_thought|>A<|end_of_thought|><|begin_of_solution|>B<|end_of_solution|>",
        "<unused94>thought\nA<unused95>B",
        "<answer>$\\boxed{B}$</answer>",
        "\\boxed B",
        "{\\bf B}",
        "B<end_of_turn>",
        # More words for it.
        "So the answer's B.",
        "It has to be B.",
        "It's actually B.",
        "B seems most plausible.",
        "I vote for B.",
        "That's B.",
        "My final decision is B",
        "The answer is B, A is farther away",
        "Svaret är B",
        "Jawabannya adalah B",
        "Đáp án là B",
        # Behind "A: " its own words.
        "A is not right: the answer is B",
        "A is not visible: my final answer is B",
        "Not A: so B",
        # What is added to a statement may exclude other options.
        "The answer is B because A is not near.",
        "B is correct because A is wrong",
        "(B) because the left box is not near.",
        "I choose B since the left box is not near.",
        "The correct answer is (B) as the left box cannot be seen clearly.",
        "The answer is B - it's not left",
        "The answer is B — A is not plausible",
        "The answer is B (not left)",
        "B is correct while A is not near.",
        "The answer is B although the left box is not far.",
        "A - it is not near\nB - it is near",
        # What is said of another answer takes none back.
        "Answer B.",
        "Answer B",
        "I would answer B.",
        "Answer B is correct",
        "The answer option B",
        "Answer B because it is near.",
        # Letters behind an option's own words.
        "So the closest is the right box **(B)**.",
        "The right box (option B) is closest.",
        "The answer is the right box (B).",
        # More writings of a letter.
        "\\boxed{\\textit{B}}",
        "\\boxed{\\textrm{B}}",
        "\\boxed{\\texttt{B}}",
        "\\boxed{\\mathit{B}}",
        "\\boxed{\\operatorname{B}}",
        "\\boxed{\\quad B}",
        "$\\textsf{B}$",
        "option b is correct",
        "the answer is b because it is nearer",
        "Option b, since it is near",
    ],
    "(A)": [
        "A",
        "a",
        "(a)",
        "The answer is a",
        "Answer (A)",
        "A is right",
        "To answer the question: A",
        "I answer A.",
        "B... no, A.",
        "I assume the answer is A.",
        # What is said of another answer takes none back.
        "The answer is A. Answer B refers to the right box.",
        "The correct answer is A. Answer B is farther.",
        "The answer is A. The answer B would require the box to be near.",
        "The answer is A. My second choice is B.",
        "First choice: A. Second choice: B.",
        "The answer is A. The other option is B.",
        "The answer is A. The runner-up answer is B.",
        "The answer is A. The next best answer is B.",
        "The answer is A. An alternative answer is B.",
        "The opposite answer is B. The answer is A.",
        "Answer (A)",
        "I answer A.",
        "Answer A\nIt is near.",
        "Answer A The left box",
        "I answer A because it is near",
        "I answer A with confidence.",
    ],
    None: [
        "",
        "(A) (B)",
        "A. B.",
        "(A) or (B)",
        "A/B",
        "neither A nor B",
        "Both A and B are correct",
        "The answer is A or B",
        "Answer: A, B",
        "(A) The left box (B) The right box",
        "Answer: (A)(B)",
        "Answer: A and/or B",
        "Option A: 20%. Option B: 80%.",
        "Option A is wrong.",
        "The answer is not A.",
        "The answer is anything but A",
        "All but A",
        "Anything except A",
        "I doubt it's A",
        "If the answer is A, then the left one would be nearer.",
        "The answer would be A if the left one were nearer.",
        "Is the answer A?",
        "Could it be A? Could it be B?",
        "The answer is A or possibly B.",
        "B. The right box is not the answer.",
        "Whether it is A depends on whether it is B",
        # What is said of an option isn't that it is chosen.
        "A is impossible",
        "A is invalid",
        "A is less likely",
        "I disagree with A",
        "A: no",
        "A seems off",
        "A is farther",
        "A vs B",
        "Answer: A B",
        "Choose from A, B, C, D",
        "The answer is A. Wait, A is farther away",
        "Nicht A",
        "La respuesta no es A",
        "Die Antwort ist nicht A",
        "Ответ не A",
        "答えはAではありません",
        "정답은 A가 아닙니다",
        "A red ball",
        "I think so",
        "E",
        "<think>it may be B",
        "The left box or the right box",
        # What others would say, or anybody in another case.
        "Many would answer A.",
        "One might answer A.",
        "People would choose A.",
        "You could choose A.",
        "A child would choose A",
        "To answer, A is farther.",
        "Assume that the answer is A",
        "Let the answer be A.",
        "If you choose A, then the rest is far",
        "A if it's left, B if it's right",
        "The answer depends: A if left, B if right",
        "If it is left, the answer is A. If it is right, the answer is B.",
        # An echo of the instruction.
        "For example, if your answer is the option A, answer (A).",
        "Please choose A, B, C or D",
        # Several.
        "Maybe it's A, maybe it's B",
        "Either A or B is right",
        "A is correct and B is correct",
        "A is correct. B is correct.",
        "Answer: A B C",
        "The answer is A|B",
        "The answer is A; B",
        "A to D",
        "A? B?",
        # Of an option.
        "(A) is farther",
        "(A) says left",
        "Option A mentions the left box",
        "A is actually farther",
        "B is actually wrong",
        "B is the only one visible",
        "A is left",
        "The worst answer is A",
        "The least likely answer is A",
        "The answer to question A is unknown",
        "A, no",
        "C++",
        # Behind "A: " its own words.
        "Choice A: my view does not support it.",
        # What is added to a statement may exclude other options.
        "It is not B because A is near",
        "A is wrong because B is right",
        "A - it is not near",
        "A — this is wrong",
        "Option A as stated is not right",
        "A while plausible is not near",
        "B as well as A is not right",
        "The answer is B - it's wrong",
        "The answer is not B because it is far",
        "Option A (not visible)",
        # What is said of another answer takes none back.
        "Answer A describes the left box.",
        "My second choice is B.",
        "The answer A or B",
        # Letters behind an option's own words.
        "Option A mentions the left box",
        "The left box (A) or the right box (B)",
        "The right box (A) is near",
        # More writings of a letter.
        "option b is wrong",
        "option b is farther",
    ],
}


@pytest.mark.parametrize(
    ("expected", "output"), [(letter, text) for letter, texts in STATED.items() for text in texts]
)
def test_the_stated_answer_counts(expected, output):
    assert parse_choice(output, BOXES) == expected


# Options of other kinds: options, then the one that is stated, then texts.
OF_OTHER_KINDS = [
    # Behind "A: " its own words.
    (["left", "right"], "(B)", ["A: the cat is not on the left\nB: the cat is on the right"]),
    (["left", "right"], None, ["Option A: the cat is not on the left."]),
    (["a sign", "no sign"], None, ["Option A: the sign is not visible. Option B: a sign is visible"]),
    # Refusals and idioms: an option's words in passing.
    (
        ["Yes", "No"],
        None,
        [
            "I have no idea.",
            "There is no way to tell from the image.",
            "I'm sorry, there is no image.",
            "As an AI, I have no access to images",
            "There's no clear answer.",
            "N/A",
            "Answer: N/A",
            "I see no-one",
            "The answer is N/A.",
        ],
    ),
    (["Above", "Below"], None, ["None of the above."]),
    (
        ["Above", "None of the above"],
        "(B)",
        ["None of the above.", "I think none of the above is right", "Answer: none of the above"],
    ),
    (["Yes", "No", "N/A"], "(C)", ["N/A", "The answer is N/A."]),
    (["Near", "Far"], None, ["So far so good.", "So far, I can see two boxes"]),
    (["Near", "Far"], "(B)", ["The box is so far away.", "It is so far."]),
    (
        ["left", "right"],
        None,
        ["You're right, I can't see it.", "You are absolutely right.", "I can't see it right now."],
    ),
    (["left", "right"], "(B)", ["It's right.", "You are right of it", "On the right."]),
    (
        ["Yes", "No"],
        "(A)",
        [
            "Yes, there are no people in it.",
            "Yes, there is no doubt.",
            "Yes.\n\nThere is no car.",
            "Yes it is.",
            "Yes there are two people",
        ],
    ),
    (
        ["Yes", "No"],
        "(B)",
        [
            "No.",
            "No, there are people in it",
            "no",
            "The answer is no.",
            "Looking at the image, No is the answer.",
            "No it is far",
            "I would say no",
            "No - the box is far",
            "No\nThere is a box.",
            "There is a car: no",
        ],
    ),
    # Options with signs that are markup elsewhere, and words that are a change of mind.
    (["10 m", "20 m²"], "(B)", ["20 m²", "20 m².", "It is 20 m²."]),
    (["O2", "CO₂"], "(B)", ["CO₂", "The gas is CO₂"]),
    (["1", "½"], "(B)", ["½"]),
    (["go_sign", "stop_sign"], "(B)", ["stop_sign", "It is a stop_sign."]),
    (["x_0", "x_1"], "(B)", ["x_1"]),
    (["Go", "Wait", "Wait for the pedestrian"], "(B)", ["Wait", "wait.", "Wait."]),
    (["Go", "Wait", "Wait for the pedestrian"], "(C)", ["Wait for the pedestrian", "Wait for the pedestrian."]),
    (["<", ">", "="], "(B)", [">"]),
    (["C", "C++"], "(B)", ["C++"]),
    (["3", "√3"], "(B)", ["√3"]),
    (["3", "√3"], "(A)", ["3"]),
    (["1", "-1"], "(B)", ["\u22121", "-1", "It is \u22121.", "It is -1"]),
    (["1", "\u22121"], "(B)", ["-1", "\u22121"]),
    (["B", "A"], "(A)", ["A"]),
    # Options whose words have letters in them.
    (
        ["neither; their concentrations are the same", "Solution A", "Solution B"],
        "(C)",
        ["The answer is Solution B.", "Answer: Solution B", "Solution B"],
    ),
    (
        ["neither; their concentrations are the same", "Solution A", "Solution B"],
        "(B)",
        ["The answer is Solution A.", "Answer: B", "The answer is (B) Solution A", "Solution A is denser."],
    ),
    (
        ["neither; their concentrations are the same", "Solution A", "Solution B"],
        None,
        ["The answer is not Solution A.", "Solution A or Solution B", "Solution C"],
    ),
    (["Box B", "Box A"], "(A)", ["Answer: Box B", "The answer is Box B.", "Answer: A", "Box B is nearer."]),
    (
        ["A is closer", "B is closer"],
        "(B)",
        [
            "B is closer to the camera.",
            "Point B is closer to the camera.",
            "The answer is B is closer.",
            "B is closer than A.",
            "B is closer to the camera than A.",
            "Point B is closer to us than point A.",
        ],
    ),
    (
        ["A is darker", "B is darker", "About the same"],
        "(B)",
        ["B is darker than A.", "B is darker.", "Point B is darker than point A."],
    ),
    (
        ["A is darker", "B is darker", "About the same"],
        None,
        ["B is not darker than A.", "A is darker or B is darker"],
    ),
    (["Point A", "Point B", "Point C", "Point D"], "(B)", ["The corresponding point is Point B."]),
    (["A", "B", "Both A and B"], "(C)", ["Both A and B are correct", "The answer is both A and B."]),
    # Other scripts and number words.
    (["左边", "右边"], "(A)", ["物体在左边。", "答案是左边", "在左边", "不是右边，是左边"]),  # noqa: RUF001 (Chinese marks)
    (["左边", "右边"], None, ["不在左边", "左边或右边"]),
    (["ซ้าย", "ขวา"], "(A)", ["อยู่ทางซ้าย"]),
    (["ひだり", "みぎ"], "(B)", ["ものはみぎにあります"]),
    (["是", "不是"], "(B)", ["不是"]),
    (["是", "不是"], "(A)", ["是"]),
    (["有人", "没有"], None, ["没有图像", "我没有办法回答"]),
    (["有人", "没有"], "(B)", ["没有。", "图中没有。"]),
    (["0", "1", "2", "3"], "(C)", ["two", "Two.", "**Two**"]),
    (["zero", "one", "two"], "(C)", ["2"]),
    (["0", "1", "2", "3"], None, ["one of the boxes", "no one"]),
    # Number words within a sentence.
    (
        ["2", "3", "1", "0"],
        "(B)",
        [
            "There are three chairs in the image.",
            "I see three chairs.",
            "Three chairs are visible.",
            "The number of chairs is three.",
            "There are three chairs. The one on the left is red.",
            "I see three chairs: a red one, a green one, and a blue one.",
            "One can see three chairs.",
            "Two on the left and one on the right. So three.",
        ],
    ),
    (
        ["2", "3", "1", "0"],
        "(C)",
        ["There is one chair.", "I see one chair.", "Only one.", "The answer is one.", "One chair is visible."],
    ),
    (["2", "3", "1", "0"], "(D)", ["There are zero chairs."]),
    (["2 chairs", "3 chairs"], "(B)", ["There are three chairs."]),
    (["zero", "one", "two"], "(C)", ["There are 2 chairs."]),
    (["zero", "one", "two"], "(B)", ["There is one.", "I see one chair."]),
    (["zero", "one", "two"], None, ["the one on the left", "one or two"]),
    # "One" that counts nothing.
    (
        ["2", "3", "1", "0"],
        None,
        [
            "The one on the left.",
            "This one is red.",
            "That one",
            "No one is there.",
            "There is no one in the image.",
            "One of the chairs is red.",
            "I see one of the boxes.",
            "It is the only one.",
            "The left one is closest.",
            "Each one is red.",
            "One thing is clear.",
            "One should look closer.",
            "On the one hand, it is dark.",
            "one another",
        ],
    ),
    # Other words that aren't the count.
    (
        ["2", "3", "1", "0"],
        None,
        [
            "two or three chairs",
            "There are not three chairs.",
            "At least two chairs.",
            "There are more than two chairs.",
            "Two on the left and one on the right.",
            "One is on the left, two are on the right.",
            "Two on the left and another on the right.",
            "Two chairs on the left and two chairs on the right.",
            "There is one chair on the left and two on the right.",
            "There are two on the left. There are three on the right.",
            "There are two on the left. There are four on the right.",
            "twenty two chairs",
            "There are two hundred chairs.",
            "Two thirds of it.",
            "A three-legged chair.",
            "Option two",
        ],
    ),
]


@pytest.mark.parametrize(
    ("choices", "expected", "output"),
    [(choices, letter, text) for choices, letter, texts in OF_OTHER_KINDS for text in texts],
)
def test_options_of_other_kinds(choices, expected, output):
    assert parse_choice(output, choices) == expected


def test_an_article_is_no_answer():
    assert parse_choice("A person stands near a box.", ["1", "2"]) is None
    assert parse_choice("A person stands near a box.", ["Near", "Far"]) == "(A)"
    assert parse_choice("A person stands near a box.", ["Far", "Near"]) == "(B)"


def test_options_that_are_letters_themselves():
    choices = ["B is closer", "A is closer"]
    assert parse_choice("A is closer", choices) == "(B)"
    assert parse_choice("(A) B is closer", choices) == "(A)"
    assert parse_choice("B", choices) == "(B)"
    assert parse_choice("10", ["1", "2"]) is None and parse_choice("There are 2.", ["1", "2"]) == "(B)"


def test_options_whose_own_words_sound_like_verdicts():
    assert parse_choice("(B) No, the red one is behind.", ["Yes", "No"]) == "(B)"
    choices = ["The left box", "None of them", "It cannot be determined"]
    assert parse_choice("The answer is (C) It cannot be determined.", choices) == "(C)"
    assert parse_choice("Answer: B. None of them, since A is wrong", choices) == "(B)"
    assert parse_choice("(B) None of them is wrong", choices) is None


def test_a_sentence_about_the_stated_option_takes_nothing_back():
    options = ["the lamp", "the sofa"]
    for about in ("The lamp is not behind the sofa.", "The lamp would be closer if it stood there.", "The lamp."):
        assert parse_choice(f"The answer is A. {about}", options) == "(A)"
        assert parse_choice(f"The answer is (A). {about}", options) == "(A)"
    # Without a statement "A." is the option's letter.
    assert parse_choice("A. The lamp is not closer. B. The sofa is closer.", options) is None
    assert parse_choice("The answer is not A. The lamp is far.", options) is None


def test_an_options_own_words_may_begin_a_sentence():
    choices = ["the lamp", "the chair", "the sofa"]
    for text in (
        "C. The sofa is closest to the camera.",
        "(C) The sofa is closer than the lamp.",
        "Both are visible.\nC: the sofa appears nearest.",
    ):
        assert parse_choice(text, choices) == "(C)"
    assert parse_choice("A. The lamp is wrong.", choices) is None
    assert parse_choice("A. The lamp is far.\nC. The sofa is near.", choices) is None
    assert parse_choice("A. The lamp is far. The answer is C.", choices) == "(C)"


@pytest.mark.parametrize(
    "output",
    [
        "If I had to guess, I would say B.",
        "Based on visual cues such as size and position, the answer is B.",
        "Considering, for example, the shadows, I would choose B.",
        "From cues such as size, B is the correct answer.",
        "Given cues such as size and shading, B. The left box is far.",
        "If we look at the image, I can say the answer is B.",
        "Comparing A and B, B is the correct answer.",
        "Of (A) and (B), (B) is the correct answer.",
    ],
)
def test_what_leads_to_an_answer(output):
    assert parse_choice(output, BOXES) == "(B)"


@pytest.mark.parametrize(
    "output",
    [
        "A, B is the correct answer.",
        "A and B is the correct answer.",
        "Answer with a letter such as A, B or C.",
        "Answer with a letter, e.g. (A), (B) or (C).",
    ],
)
def test_what_only_names_letters(output):
    assert parse_choice(output, BOXES) is None


CARS = ["the red car", "the blue car"]


@pytest.mark.parametrize(
    "output",
    [
        # Words between the word for the answer and its verb.
        "The correct answer from the options above is B.",
        "The correct answer from the options above is: B",
        "The correct answer from the options above: B",
        "The correct answer from the options above is (B)",
        "The correct answer from the options above is **B. the blue car**",
        "The correct answer from the options above is b.",
        "The correct choice among the given options is (B).",
        "The best answer among the provided options is B.",
        "The best option among those provided is option B.",
        "The correct option for this image is B.",
        "The correct answer based on the image is B.",
        "The correct answer, based on the image, is B.",
        "The correct answer based on what I see is B.",
        "The answer based on the visual evidence is (B).",
        "The correct answer according to the depth of the objects in the picture is B.",
        "The most appropriate choice given the scene is (B) the blue car.",
        "The right choice for this question is clearly B.",
        "The answer to the question about depth should be B.",
        "The option that best describes the image is B.",
        "The best answer I can give is B.",
        "The correct one is B.",
        "The best match for the description is B.",
        "**Answer for this image:** (B)",
        "<think>The correct answer from the options is A.</think>The correct answer from the options above is B.",
        # Other options are excluded or mentioned.
        "The correct answer for this image is B, not A.",
        "The correct answer for this image is not A but B.",
        "The correct answer from the options above isn't A, it's B.",
        "The correct answer from the options above is B because A is far.",
        "The correct answer from the options above is A. However, the correct answer from the options above is B.",
        "Option A is what most people choose, but the correct answer for this image is B.",
        # What the text is drawn to.
        "This corresponds to option (B).",
        "This corresponds to (B).",
        "This matches option B.",
        "The blue car is closer, which corresponds to option B.",
        "The blue car is closer, corresponding to option (B).",
        "The blue car is in front, which is option B.",
        "Option A is the red car. The blue car is closer. This corresponds to option B.",
        "<think>This corresponds to option A.</think>This corresponds to option B.",
        "Therefore, the closest object is option B.",
        "The description clearly matches option B.",
        # A letter with its own words behind "is".
        "Therefore, the object closer to the camera is (B) the blue car.",
        "Thus, the closer object is B. the blue car",
        "The object that is closer is (B) the blue car, which is in front.",
        "The object on the left is (A) the red car. Therefore, the closer one is (B) the blue car.",
    ],
)
def test_an_answer_in_a_longer_sentence(output):
    assert parse_choice(output, CARS) == "(B)"


@pytest.mark.parametrize(
    "output",
    [
        # Excluded, asked, supposed, or several.
        "The correct answer is not B.",
        "The correct answer from the options above is not B.",
        "The correct option for this image cannot be B.",
        "I am not sure the correct option for this image is B",
        "It is not clear whether the answer among these options is A or B",
        "The correct answer from the options above is A or B.",
        "The correct answer from the options above is neither A nor B.",
        "The correct answer among the options might be B.",
        "Is the correct answer from the options above B?",
        "If the correct answer from the options is A, the red car would be near.",
        "The correct answer from the options above would be A if the red car were nearer.",
        "If it is day, the correct answer for this image is A. If it is night, the correct answer for it is B.",
        "Maybe the correct option for this image is A, maybe the correct option for this image is B.",
        "<think>The correct answer from the options above is B.",
        # Other people's answers, or those to other questions.
        "The answer that is B is wrong",
        "The answer from option A's author is unclear",
        "The answer to option A is unclear.",
        "The answer that most people choose is A.",
        "The answer given by many is A.",
        "The answer of a child would be A.",
        "The answer to the previous question is A.",
        "The answer in the example is A.",
        "The wrong answer among the options is A.",
        "The correct answer depends on what is B.",
        "The answer for the blue car is A.",
        "The answer for the red car is A and for the blue car is B.",
        "The answer for the cat is A and for the dog is B.",
        "The answer for the cat is A, while for the dog it is B.",
        "The answer for the cat is A. The answer for the dog is B.",
        # A place, or a letter in the picture.
        "The option on the left is A.",
        "The letter on the car is A.",
        "The right one is A.",
        "The correct answer for this image is A car.",
        # The options again.
        "A. the red car B. the blue car",
        "The options are (A) the red car and (B) the blue car.",
        "Select the correct answer from the options above: A. the red car B. the blue car",
        "Select the best answer for this image:\nA. the red car\nB. the blue car",
        "Between (A) and (B), it is hard to say.",
        "Neither (A) the red car nor (B) the blue car",
        # What an option is, not that it is chosen.
        "The red car is (A) and the blue car is (B).",
        "The red object is (A) the red car and the other is (B) the blue car.",
        "The object on the left is (A) the red car. The object on the right is (B) the blue car.",
        "The closer object is not (B) the blue car.",
        "The closer object is either (A) the red car or (B) the blue car.",
        "Whether the closer object is (B) the blue car is unclear.",
        "If the closer object is (B) the blue car, it is day.",
        "The red car corresponds to option A. The blue car corresponds to option B.",
        "Option A corresponds to the red car.",
        # What matches an option, if anything does.
        "This does not correspond to option A.",
        "This corresponds to option A or B.",
        "This partially matches option A.",
        "Nothing corresponds to option A.",
        "No object matches option A.",
        "The point that corresponds to option A is far.",
        "Let me see what corresponds to option A.",
        "Which is option A?",
        "If this matches option A, it is near.",
        "Some would say this corresponds to option A.",
        "The label on the car is option A.",
    ],
)
def test_longer_sentences_that_choose_none(output):
    assert parse_choice(output, CARS) is None


def test_free_answers_are_read_behind_the_reasoning():
    assert final_answer("<think>two? no</think> <answer>three</answer>") == "three"
    assert final_answer("<think>no end") == ""
    assert final_answer("analysisThe left box is") == final_answer("<|channel|>analysis<|message|>Near") == ""
    assert final_answer("Analysis of the picture: near") == "Analysis of the picture: near"
    assert SCORERS["exact"]({"output": "<think>no</think>\nYes.", "answer": "yes"})
    assert SCORERS["vqa"]({"output": "<think>cat</think>dog", "answer": ["dog"] * 10}) == 1


def test_long_outputs_are_read_in_passing():
    for text in (
        "answer is " * 5_000,
        "(A " * 5_000,
        "<answer>" * 5_000,
        "\\boxed{" * 5_000,
        "not A, " * 5_000,
        "(" * 20_000,
        "-" * 20_000,
        " " * 20_000,
        "[ ] " * 5_000,
        "</" * 10_000,
        "\u2705" * 20_000,
        "The answer for x is A " + "and for " * 5_000,
        "the correct answer from the " * 2_000,
        "is option " * 5_000,
        "clearly " * 8_000 + "A",
    ):
        begin = time.process_time()
        assert parse_choice(text, BOXES) in (None, "(A)")
        assert time.process_time() - begin < 2
