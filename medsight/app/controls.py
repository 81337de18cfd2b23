"""The controls of the page, and where they stand."""

from collections.abc import Sequence

import gradio as gr

from . import markup
from .examples import Example
from .session import Session


HEADER = """
<header class="ms-header"><h1>MedSIGHT</h1>
<p>Ask about a medical image: the answer shows, pixel by pixel, what it means.</p>
<p class="ms-warning"><b>Not a medical device:</b> never for a clinical decision.</p>
</header>"""
DEFAULT_WINDOW = "default"
QUESTION_LENGTH = 2000  # characters
CLEAN_EVERY, KEEP_FOR = 600, 3600  # seconds: shown pictures and archives in the server's folder


class Controls:
    """The components of the page as attributes.

    Args:
        examples: a button each.

    Attributes:
        blocks: the Gradio application.
        session: the visitor's `Session`.
        outputs: the components that an event may change.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        with gr.Blocks(
            title="MedSIGHT", analytics_enabled=False, delete_cache=(CLEAN_EVERY, KEEP_FOR), fill_width=True
        ) as self.blocks:
            self.session = gr.State(None, delete_callback=_close)
            gr.HTML(HEADER)
            with gr.Row(equal_height=False):
                with gr.Column(scale=6, min_width=320, elem_id="ms-viewer"):
                    self._lay_out_viewer()
                with gr.Column(scale=5, min_width=320, elem_id="ms-talk"):
                    self._lay_out_talk()
        view = [self.picture, self.facts, self.slice, self.plane, self.window, self.layers, self.card, self.back]
        save = [self.formats, self.deidentify, self.archive]
        self.outputs = [self.session, self.upload, *view, self.chat, self.question, *save]

    def _lay_out_viewer(self) -> None:
        self.upload = gr.File(
            label="Picture, DICOM (also series), NIfTI", file_count="multiple", height=88, elem_id="ms-upload"
        )
        with gr.Row(elem_id="ms-examples"):
            self.example_buttons = [gr.Button(each.title, size="sm", min_width=120) for each in self.examples]
        self.picture = gr.Image(
            label="Image",
            show_label=False,
            interactive=False,
            visible=False,
            format="png",
            buttons=["fullscreen"],
            elem_id="ms-picture",
        )
        self.card = gr.HTML(visible=False, elem_id="ms-card")
        self.back = gr.Button("Back to the masks", size="sm", visible=False, elem_id="ms-back")
        self.facts = gr.HTML(visible=False)
        with gr.Row():
            self.slice = gr.Slider(
                1, 2, 1, step=1, label="Slice", visible=False, buttons=[], scale=3, elem_id="ms-slice"
            )
            self.plane = gr.Dropdown([], label="Plane", visible=False, scale=1, elem_id="ms-plane")
            self.window = gr.Dropdown(
                [DEFAULT_WINDOW],
                value=DEFAULT_WINDOW,
                allow_custom_value=True,
                label="Window (name or centre/width)",
                visible=False,
                scale=2,
                elem_id="ms-window",
            )
        self.layers = gr.HTML(js_on_load=markup.SCRIPT, visible=False, elem_id="ms-layers")

    def _lay_out_talk(self) -> None:
        self.chat = gr.HTML(markup.conversation([], 1), js_on_load=markup.SCRIPT, autoscroll=True, elem_id="ms-chat")
        self.question = gr.Textbox(
            label="Question",
            placeholder="Segment the liver.",
            max_length=QUESTION_LENGTH,
            submit_btn="Ask",
            elem_id="ms-question",
        )
        self.anew = gr.Button("New conversation", size="sm", elem_id="ms-anew")
        with gr.Accordion("Settings", open=False, elem_id="ms-settings"):
            self.max_new_tokens = gr.Slider(8, 512, 128, step=8, label="Longest answer, in tokens")
            self.threshold = gr.Slider(
                0.05, 0.95, 0.5, step=0.05, label="Probability from which on a pixel belongs to a mask"
            )
            self.predicted_only = gr.Checkbox(
                False, label="Cite only region codes of the group that the model sees in the image"
            )
        with gr.Accordion("Download the masks", open=False, elem_id="ms-download"):
            self.formats = gr.CheckboxGroup(["png", "coco"], value=["png"], label="Formats")
            self.deidentify = gr.Checkbox(False, label="Leave the patient out of DICOM files", visible=False)
            self.save_button = gr.Button("Make the archive", size="sm")
            self.archive = gr.File(label="Archive", visible=False, interactive=False, elem_id="ms-archive")


def _close(session: Session | None) -> None:
    if session is not None:
        session.close()
