use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;

use super::*;
use crate::{Begin, ByteString, ExitStatus, FailReason, Identity, Start, StreamKind, WindowSize};

const STAGES: [Stage; 7] =
    [Stage::Silent, Stage::Greeted, Stage::Begun, Stage::Ready, Stage::Asked, Stage::Running, Stage::Over];

const PAUSES: [Pause; 5] = [Pause::No, Pause::Asked, Pause::Frozen, Pause::Recalled, Pause::Identifying];

fn image(size: usize) -> FromAgent {
    FromAgent::Image { config: Some(ByteString(vec![b' '; size])) }
}

fn failed(size: usize) -> FromAgent {
    FromAgent::Failed { reason: FailReason::Setup, message: "x".repeat(size) }
}

fn restored(streams: usize) -> FromAgent {
    FromAgent::Restored { streams: vec![(StreamKind::Stdout, 7); streams] }
}

fn hello() -> FromAgent {
    FromAgent::Hello { version: PROTOCOL_VERSION }
}

fn begin() -> ToAgent {
    ToAgent::Begin(Box::<Begin>::default())
}

fn start() -> ToAgent {
    ToAgent::Start(Box::<Start>::default())
}

fn identity() -> ToAgent {
    ToAgent::Restored(Box::<Identity>::default())
}

const EXITED: FromAgent = FromAgent::Exited(ExitStatus::Code(0));

/// Plays a whole conversation; `Ok` is what the agent says, `Err` what the host says.
fn play(mut dialogue: Dialogue, lines: impl IntoIterator<Item = Result<FromAgent, ToAgent>>) -> Dialogue {
    for line in lines {
        match line {
            Ok(heard) => assert_eq!(dialogue.heard(&heard), Ok(()), "{heard:?}"),
            Err(said) => assert!(dialogue.say(&said), "{said:?}"),
        }
    }
    dialogue
}

#[test]
fn a_session() {
    let end = play(
        Dialogue::default(),
        [
            Ok(hello()),
            Err(begin()),
            Ok(image(MAX_IMAGE_CONFIG)),
            Err(start()),
            Err(ToAgent::Resize(WindowSize { rows: 1, columns: 1 })),
            Ok(FromAgent::Started { pid: 2 }),
            Err(ToAgent::Signal(15)),
            Ok(EXITED),
            Err(ToAgent::Shutdown),
        ],
    );
    assert_eq!(end.stage, Stage::Over);
}

#[test]
fn sessions_in_copies() {
    let lines = [Err(begin()), Ok(image(0)), Err(start()), Ok(FromAgent::Started { pid: 2 }), Ok(EXITED)];
    assert_eq!(play(Dialogue::in_template(), lines).stage, Stage::Over);
    let lines = [
        Err(ToAgent::Signal(9)),
        Err(identity()),
        Ok(restored(MAX_STREAMS)),
        Err(ToAgent::Freeze),
        Ok(FromAgent::Frozen),
        Err(ToAgent::Thaw),
        Ok(EXITED),
    ];
    assert_eq!(play(Dialogue::in_snapshot(), lines).stage, Stage::Over);
}

#[test]
fn a_freeze_that_is_taken_back_is_answered_all_the_same() {
    let running = Dialogue { stage: Stage::Running, pause: Pause::No };
    for recall in [ToAgent::Thaw, ToAgent::Shutdown] {
        let mut dialogue = play(running, [Err(ToAgent::Freeze), Err(recall)]);
        assert!(!dialogue.say(&ToAgent::Freeze), "the answer would be mistaken for this one's");
        assert_eq!(dialogue.heard(&FromAgent::Frozen), Ok(()));
        assert_eq!(dialogue, running);
        assert!(dialogue.heard(&FromAgent::Frozen).is_err());
    }
    // The end of the container crosses with it.
    assert_eq!(play(running, [Err(ToAgent::Freeze), Ok(EXITED)]).stage, Stage::Over);
    assert_eq!(play(running, [Err(ToAgent::Freeze), Ok(FromAgent::Frozen), Err(ToAgent::Shutdown)]), running);
}

/// Which messages of the agent are allowed in which stage while nothing is paused, and in which pause while the container runs.
#[test]
fn what_may_be_heard() {
    let messages = [
        hello(),
        image(0),
        FromAgent::Started { pid: 2 },
        EXITED,
        FromAgent::Frozen,
        restored(0),
        FromAgent::Failed { reason: FailReason::Setup, message: String::new() },
    ];
    let stages = [
        [true, false, false, false, false, false, true],
        [false, false, false, false, false, false, true],
        [false, true, false, false, false, false, true],
        [false, false, false, false, false, false, true],
        [false, false, true, false, false, false, true],
        [false, false, false, true, false, false, true],
        [false, false, false, false, false, false, false],
    ];
    let pauses = [
        [false, false, false, true, false, false, true],
        [false, false, false, true, true, false, true],
        [false, false, false, false, false, false, true],
        [false, false, false, true, true, false, true],
        [false, false, false, false, false, true, true],
    ];
    let table = STAGES.map(|stage| Dialogue { stage, pause: Pause::No }).into_iter().zip(stages);
    let table =
        table.chain(PAUSES.map(|pause| Dialogue { stage: Stage::Running, pause }).into_iter().zip(pauses));
    for (state, row) in table {
        for (message, allowed) in messages.iter().zip(row) {
            let mut dialogue = state;
            assert_eq!(dialogue.heard(message).is_ok(), allowed, "{state:?} {message:?}");
            assert_eq!(dialogue != state, allowed, "{state:?} {message:?}");
        }
    }
}

#[test]
fn what_may_be_said() {
    let messages =
        [begin(), start(), ToAgent::Signal(1), ToAgent::Freeze, ToAgent::Thaw, identity(), ToAgent::Shutdown];
    let stages = [
        [false, false, false, false, false, false, false],
        [true, false, false, true, false, false, true],
        [false, false, false, false, false, false, true],
        [false, true, false, false, false, false, true],
        [false, false, true, false, false, false, true],
        [false, false, true, true, false, false, true],
        [false, false, false, false, false, false, true],
    ];
    let pauses = [
        [false, false, true, true, false, false, true],
        [false, false, true, false, true, false, true],
        [false, false, true, false, true, true, true],
        [false, false, true, false, false, false, true],
        [false, false, true, false, false, false, true],
    ];
    let table = STAGES.map(|stage| Dialogue { stage, pause: Pause::No }).into_iter().zip(stages);
    let table =
        table.chain(PAUSES.map(|pause| Dialogue { stage: Stage::Running, pause }).into_iter().zip(pauses));
    for (state, row) in table {
        for (message, allowed) in messages.iter().zip(row) {
            let mut dialogue = state;
            assert_eq!(dialogue.say(message), allowed, "{state:?} {message:?}");
            assert!(allowed || dialogue == state, "{state:?} {message:?}");
        }
    }
}

#[test]
fn limits() {
    let hears = |stage, pause, message: FromAgent| Dialogue { stage, pause }.heard(&message);
    let newer = PROTOCOL_VERSION + 1;
    let hello = FromAgent::Hello { version: newer };
    assert_eq!(hears(Stage::Silent, Pause::No, hello), Err(Violation::Version(newer)));
    assert_eq!(hears(Stage::Begun, Pause::No, image(MAX_IMAGE_CONFIG + 1)), Err(Violation::TooLong));
    assert_eq!(hears(Stage::Asked, Pause::No, failed(MAX_FAIL_MESSAGE)), Ok(()));
    assert_eq!(hears(Stage::Asked, Pause::No, failed(MAX_FAIL_MESSAGE + 1)), Err(Violation::TooLong));
    let many = restored(MAX_STREAMS + 1);
    assert_eq!(hears(Stage::Running, Pause::Identifying, many), Err(Violation::TooLong));
}
