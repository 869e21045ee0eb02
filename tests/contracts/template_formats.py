"""How the chat templates of real models write a conversation: by hand, from the models' own pages.

The templates themselves are read where TRL ships them; the tokens are those of the families.
"""

from dataclasses import dataclass, field, replace

DROPS, ERROR, MISMATCH, OPEN = "template_drops", "template_error", "prefix_mismatch", "no_reasoning"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The special tokens that a family adds, and the ends that its generation config has."""

    tokens: tuple[str, ...]
    bos: str | None = None
    eos: str
    ends: tuple[str, ...]
    base: str = "smollm2"


@dataclass(frozen=True, kw_only=True)
class Format:
    """What stands where. `start` is what every text begins with, `silence` what stands for a system
    message that is not there (None: text that depends on the tools or the day). `plain` is an
    answer in the text (`history`: once others follow), `end` ends it, `between` follows where
    another turn comes (`last` is the end of the last answer alone). Instead of texts, reasons for
    which samples are refused.
    """

    family: Family
    start: str = ""
    silence: str | None = ""
    system: str
    user: str
    ask: str
    plain: str = "{}"
    history: str | None = None
    end: str
    last: str | None = None
    between: str = ""
    strips: bool = False
    call: str = DROPS
    call_end: str | None = None
    result: str = DROPS
    answer_behind_result: str | None = None
    think: str = DROPS
    ask_nothink: str | None = None
    plain_nothink: str | None = None
    user_nothink: str | None = None
    refused: dict[str, str] = field(default_factory=dict)


IM = Family(
    tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    ends=("<|im_end|>", "<|endoftext|>"),
)
CHATML = Format(
    family=IM,
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    ask="<|im_start|>assistant\n",
    end="<|im_end|>",
    between="\n",
)
JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    "</tool_call>"
)
RESPONSE = "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
QWEN = replace(CHATML, call=JSON_CALL, result=RESPONSE)
NO_THOUGHT = "<think>\n\n</think>\n\n"
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN_HELPFUL = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n"
)
THINKING = replace(
    QWEN,
    ask="<|im_start|>assistant\n<think>\n",
    plain="\n</think>\n\n{}",
    history="{}",
    strips=True,
    call="\n</think>\n\n" + XML_CALL,
    think="Two and two.\n</think>\n\n4.",
    ask_nothink="<|im_start|>assistant\n" + NO_THOUGHT,
    plain_nothink="{}",
    refused={"multi": MISMATCH},
)
NEMOTRON = replace(
    CHATML,
    silence="<|im_start|>system\n<|im_end|>\n",
    ask="<|im_start|>assistant\n<think>\n",
    think="Two and two.\n</think>\n4.",
    ask_nothink="<|im_start|>assistant\n<think></think>",
    refused=dict.fromkeys(("single", "system", "multi", "last", "call", "result", "newline"), OPEN),
)
COHERE = Format(
    family=Family(
        tokens=(
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        ends=("<|END_OF_TURN_TOKEN|>",),
    ),
    start="<BOS_TOKEN>",
    system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    ask="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    end="<|END_OF_TURN_TOKEN|>",
    strips=True,
    result=ERROR,
)
DEEPSEEK = Format(
    family=Family(
        tokens=(),
        bos="<｜begin▁of▁sentence｜>",  # noqa: RUF001 - the token's own signs
        eos="<｜end▁of▁sentence｜>",  # noqa: RUF001
        ends=("<｜end▁of▁sentence｜>",),  # noqa: RUF001
        base="deepseek",
    ),
    start="<｜begin▁of▁sentence｜>",  # noqa: RUF001
    system="{}",
    user="<｜User｜>{}",  # noqa: RUF001
    ask="<｜Assistant｜><think>\n",  # noqa: RUF001
    end="<｜end▁of▁sentence｜>",  # noqa: RUF001
    think="Two and two.\n</think>\n\n4.",
    refused=dict.fromkeys(("single", "system", "multi", "last", "nothink", "newline"), OPEN)
    | {"call": DROPS, "result": DROPS},
)
GEMMA = Format(
    family=Family(
        tokens=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        ends=("<eos>", "<end_of_turn>"),
    ),
    start="<bos>",
    system=ERROR,
    user="<start_of_turn>user\n{}<end_of_turn>\n",
    ask="<start_of_turn>model\n",
    end="<end_of_turn>",
    between="\n",
    strips=True,
    result=ERROR,
)
GEMMA4 = Format(
    family=Family(
        tokens=(
            *("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>"),
            *("<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
            *("<|think|>", '<|"|>'),
        ),
        bos="<bos>",
        eos="<eos>",
        ends=("<eos>", "<|tool_response>", "<turn|>"),
    ),
    start="<bos>",
    system="<|turn>system\n{}<turn|>\n",
    user="<|turn>user\n{}<turn|>\n",
    ask="<|turn>model\n",
    end="<turn|>",
    between="\n",
    strips=True,
    call='<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>',
    call_end="<|tool_response>",
    result='<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>',
    answer_behind_result="It is sunny.",
)
GLM = Format(
    family=Family(
        tokens=(
            *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
            "<|endoftext|>",
        ),
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|observation|>", "<|user|>"),
    ),
    start="[gMASK]<sop>",
    system="<|system|>\n{}",
    user="<|user|>\n{}",
    ask="<|assistant|>",
    plain="\n<think></think>\n{}",
    end="",
    last="<|user|>",
    strips=True,
    call=(
        "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>"
        "\n</tool_call>"
    ),
    call_end="<|observation|>",
    result="<|observation|>\n<tool_response>\nsunny\n</tool_response>",
    think="\n<think>Two and two.</think>\n4.",
    user_nothink="<|user|>\n{}/nothink",
    ask_nothink="<|assistant|>\n<think></think>",
    plain_nothink="\n{}",
)
GPT_OSS = Format(
    family=Family(
        tokens=(
            *("<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
            *("<|constrain|>", "<|endoftext|>", "<|call|>", "<|return|>"),
        ),
        bos="<|startoftext|>",
        eos="<|return|>",
        ends=("<|endoftext|>", "<|call|>", "<|return|>"),
    ),
    silence=None,
    system="<|start|>developer<|message|># Instructions\n\n{}\n\n<|end|>",
    user="<|start|>user<|message|>{}<|end|>",
    ask="<|start|>assistant",
    plain="<|channel|>final<|message|>{}",
    end="",
    last="<|return|>",
    between="<|end|>",
    call=' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}',
    call_end="<|call|>",
    result='<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|>',
    think=(
        "<|channel|>analysis<|message|>Two and two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4."
    ),
)
LLAMA3 = Format(
    family=Family(
        tokens=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|python_tag|>", "<|eom_id|>", "<|eot_id|>"),
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    start="<|begin_of_text|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    ask="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    strips=True,
)
# The date is the one that kdflow gives to templates that ask for the day's.
LLAMA31_HEAD = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {date}\n\n"
)
LLAMA31 = replace(
    LLAMA3,
    silence=LLAMA31_HEAD.format(date="26 Jul 2024") + "<|eot_id|>",
    system=LLAMA31_HEAD.format(date="26 Jul 2024") + "{}<|eot_id|>",
    call='{"name": "weather", "parameters": {"city": "Paris"}}',
    result='<|start_header_id|>ipython<|end_header_id|>\n\n"sunny"<|eot_id|>',
)
PHI3 = Format(
    family=Family(
        tokens=("<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"),
        bos="<s>",
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    system="<|system|>\n{}<|end|>\n",
    user="<|user|>\n{}<|end|>\n",
    ask="<|assistant|>\n",
    end="<|end|>",
    between="\n",
)
LFM = replace(
    CHATML,
    family=Family(
        tokens=(
            *("<|startoftext|>", "<|im_start|>", "<|tool_list_start|>", "<|tool_list_end|>"),
            *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>"),
            *("<|tool_response_end|>", "<|im_end|>"),
        ),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        ends=("<|im_end|>",),
    ),
    start="<|startoftext|>",
)
LFM_CALL = "<|tool_call_start|>[weather(city='Paris')]<|tool_call_end|>"
LFM25 = replace(
    LFM,
    call=LFM_CALL,
    result="<|im_start|>tool\nsunny<|im_end|>\n",
    think="<think>Two and two.</think>4.",
)
UTTERANCES = Format(
    family=Family(
        tokens=("<|begin_of_text|>", "<|im_start|>", "<|end_of_text|>", "<end_of_utterance>"),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        ends=("<|end_of_text|>", "<end_of_utterance>"),
    ),
    start="<|begin_of_text|>",
    system="System: {}<end_of_utterance>\n",
    user="User: {}<end_of_utterance>\n",
    ask="Assistant:",
    plain=" {}",
    end="<end_of_utterance>",
    between="\n",
    call=DROPS,
    result=DROPS,
)
LLAVA = Format(
    family=Family(
        tokens=("<s>", "[INST]", "[/INST]", "</s>"), bos="<s>", eos="</s>", ends=("</s>",)
    ),
    system="<<SYS>>\n{}\n<</SYS>>\n\n",
    user="[INST] {} ",
    ask="[/INST]",
    plain=" {}",
    end="</s>",
    between=" ",
    call=DROPS,
    result=ERROR,
)
MUSE = Format(
    family=Family(
        tokens=("<|begin_of_text|>", "<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        ends=("<|eot|>",),
    ),
    silence=None,
    system="{}",
    user="<|start|>user<|message|>{}<|eot|>",
    ask="<|start|>assistant",
    plain=" to=user<|message|>{}",
    end="<|eot|>",
    call=(
        ' to=weather<|message|><atem:function_calls>\n<atem:invoke name="weather">\n'
        '<atem:parameter name="city">Paris</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
    ),
    result='<|message|><tool_output name="weather">\nsunny\n</tool_output><|eot|>',
    think=" to=self<|message|>Two and two.<|eom|><|start|>assistant to=user<|message|>4.",
)

FORMATS: dict[str, Format] = {
    "cohere": COHERE,
    "cohere2": replace(
        COHERE,
        silence=None,
        system="{}",
        ask="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        end="<|END_RESPONSE|>",
        between="<|END_OF_TURN_TOKEN|>",
        strips=False,
    ),
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "gemma": GEMMA,
    "gemma3": replace(GEMMA, system="<start_of_turn>user\n{}\n\n"),
    "gemma4": GEMMA4,
    "gemma4_v2": replace(
        GEMMA4,
        call_end="<turn|>",
        result="<|turn>tool\nsunny<turn|>\n",
        answer_behind_result=None,
    ),
    "gemma4_v5": replace(GEMMA4, think="<|channel>thought\nTwo and two.\n<channel|>4."),
    "glm4moe": GLM,
    "gptoss": GPT_OSS,
    "idefics3": UTTERANCES,
    "lfm2": LFM,
    "lfm2_v2": replace(
        LFM,
        call=LFM_CALL,
        result="<|im_start|>tool\n<|tool_response_start|>sunny<|tool_response_end|><|im_end|>\n",
    ),
    "lfm2_2_5": LFM25,
    "lfm2_2_5_v2": LFM25,
    "lfm2_2_5_vl": LFM25,
    "llama3": LLAMA3,
    "llama3_1": LLAMA31,
    "llama3_2": replace(
        LLAMA31,
        silence=LLAMA31_HEAD.format(date="01 Jan 2025") + "<|eot_id|>",
        system=LLAMA31_HEAD.format(date="01 Jan 2025") + "{}<|eot_id|>",
    ),
    "llava_next": LLAVA,
    "muse_glimmer": MUSE,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": replace(NEMOTRON, think="Two and two.</think>4."),
    "nemotron_3_5_lightning": replace(NEMOTRON, think="Two and two.</think>4."),
    "phi3": PHI3,
    "phi3_5": PHI3,
    "qwen2_5": replace(QWEN, silence=QWEN_HELPFUL),
    "qwen2_5_vl": replace(CHATML, silence=HELPFUL),
    "qwen3": replace(
        QWEN,
        plain=NO_THOUGHT + "{}",
        history="{}",
        strips=True,
        call=NO_THOUGHT + JSON_CALL,
        think="<think>\nTwo and two.\n</think>\n\n4.",
        ask_nothink="<|im_start|>assistant\n" + NO_THOUGHT,
        plain_nothink="{}",
        refused={"multi": MISMATCH},
    ),
    "qwen3_5_nothink": replace(
        QWEN,
        ask="<|im_start|>assistant\n" + NO_THOUGHT,
        history="{}",
        strips=True,
        call=XML_CALL,
        refused={"multi": MISMATCH, "think": "below"},
    ),
    "qwen3_5_think": THINKING,
    "qwen3_6": THINKING,
    "qwen3_8": replace(THINKING, silence=None, history=None, refused={}),
    "qwen3_instruct_2507": QWEN,
    "qwen3_vl": QWEN,
    "smolvlm": replace(UTTERANCES, start="<|im_start|>"),
}
