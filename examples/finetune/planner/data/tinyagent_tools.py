"""The sixteen tools of TinyAgent, described in our own words."""

from examples.finetune.planner.plans.records import Parameter, Tool


def _tool(signature: str, description: str) -> Tool:
    """A tool from "name(parameter: type, ...)"."""
    name, _, parameters = signature.removesuffix(")").partition("(")
    pairs = (parameter.split(": ") for parameter in parameters.split(", "))
    return Tool(name, description, tuple(Parameter(key, kind) for key, kind in pairs))


TINYAGENT_TOOLS = (
    _tool(
        "create_calendar_event(title: str, start_date: str, end_date: str, location: str, "
        "invitees: list[str], notes: str, calendar: str)",
        "Puts an event into the calendar. Dates look like 2024-05-31 14:00:00; invitees are email "
        "addresses.",
    ),
    _tool("get_phone_number(name: str)", "Looks up the phone number of a contact."),
    _tool("get_email_address(name: str)", "Looks up the email address of a contact."),
    _tool("open_and_get_file_path(file_name: str)", "Opens a file and gives its path."),
    _tool("summarize_pdf(pdf_path: str)", "Gives a summary of a PDF file, by its path."),
    _tool(
        "compose_new_email(recipients: list[str], cc: list[str], subject: str, context: str, "
        "attachments: list[str])",
        "Drafts an email. The context holds what the text must mention, such as a link; "
        "attachments are paths of files.",
    ),
    _tool(
        "reply_to_email(cc: list[str], context: str, attachments: list[str])",
        "Drafts a reply to the email that is selected.",
    ),
    _tool(
        "forward_email(recipients: list[str], cc: list[str], context: str, attachments: list[str])",
        "Forwards the email that is selected.",
    ),
    _tool("maps_open_location(location: str)", "Shows a place on the map and gives its link."),
    _tool(
        "maps_show_directions(start_location: str, end_location: str, transport: str)",
        "Shows the way on the map: transport is d to drive, w to walk, r for public transport; "
        "an empty start is here.",
    ),
    _tool("create_note(name: str, content: str, folder: str)", "Writes a new note."),
    _tool("open_note(name: str, folder: str)", "Opens a note and gives its content."),
    _tool(
        "append_note_content(name: str, content: str, folder: str)",
        "Adds text to the end of a note.",
    ),
    _tool(
        "create_reminder(name: str, due_date: str, notes: str, list_name: str, priority: int, "
        "all_day: bool)",
        "Sets a reminder. Dates look like 2024-05-31 14:00:00; priority is 0 to 9.",
    ),
    _tool(
        "send_sms(recipients: list[str], message: str)",
        "Sends a text message to phone numbers.",
    ),
    _tool(
        "get_zoom_meeting_link(topic: str, start_time: str, duration: int, "
        "meeting_invitees: list[str])",
        "Creates a Zoom meeting of so many minutes and gives its link.",
    ),
)
