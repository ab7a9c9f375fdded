//! Whoever is told of a cut is told once for each try, in the moment of it, and may forbid the checkpoint.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cdp_store::{CheckpointMode, CheckpointState};
use cdp_types::EpochId;
use ckpt::take::{Called, CutNotice, Order};
use serde_json::{Value, json};

use super::{Act, Bed, MODES, undisturbed, with};

/// What one who takes his time has seen.
#[derive(Default)]
struct Listener {
    epochs: Mutex<Vec<EpochId>>,
    ran: Mutex<Vec<bool>>,
    inside: AtomicBool,
    overlaps: AtomicU32,
}

fn order(bed: &Bed, mode: CheckpointMode, listener: &Arc<Listener>, veto: Option<&'static str>) -> Order {
    let (qemu, listener) = (bed.qemu.clone(), Arc::clone(listener));
    let at_cut = move |CutNotice { cut, .. }: CutNotice| {
        let (qemu, listener) = (qemu.clone(), Arc::clone(&listener));
        let told = async move {
            if listener.inside.swap(true, Ordering::SeqCst) {
                listener.overlaps.fetch_add(1, Ordering::SeqCst);
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            listener.ran.lock().unwrap().push(qemu.state().running);
            listener.epochs.lock().unwrap().push(cut.epoch);
            listener.inside.store(false, Ordering::SeqCst);
            Called { figures: json!({ "ok": veto.is_none() }), veto: veto.map(str::to_owned) }
        };
        Box::pin(told) as std::pin::Pin<Box<dyn Future<Output = Called> + Send>>
    };
    Order { at_cut: Some(Arc::new(at_cut)), ..Bed::order(mode) }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_told_sees_a_machine_that_runs_if_hot_and_else_stands_still() {
    let bed = Bed::new().await;
    for mode in MODES {
        let listener = Arc::<Listener>::default();
        let taken = bed.take(&order(&bed, mode, &listener, None), &[]).await.unwrap();
        let CheckpointState::Committed(saved) = taken.state else { panic!("{:?}", taken.state) };
        assert_eq!(saved.figures["callback"], json!({ "ok": true }), "{mode:?}");
        assert_eq!(*listener.epochs.lock().unwrap(), [taken.epoch.unwrap()], "{mode:?}");
        assert_eq!(*listener.ran.lock().unwrap(), [mode == CheckpointMode::Hot], "{mode:?}");
        bed.assert_put_back(&format!("{mode:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_veto_aborts_the_checkpoint_and_the_machine_runs_on() {
    let bed = Bed::new().await;
    for mode in MODES {
        let listener = Arc::<Listener>::default();
        let error = bed.take(&order(&bed, mode, &listener, Some("no room")), &[]).await.unwrap_err();
        assert!(error.contains("no room"), "{error}");
        bed.assert_aborted("no room");
        bed.assert_put_back(&format!("{mode:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_try_is_told_after_the_first_with_its_own_epoch() {
    let bed = Bed::new().await;
    let script = undisturbed(CheckpointMode::Hot);
    let twice = with(&script, 4, &[Act::OthersStop, Act::OthersGoOn]);
    let listener = Arc::<Listener>::default();
    let taken = bed.take(&order(&bed, CheckpointMode::Hot, &listener, None), &[twice]).await.unwrap();
    let epochs = listener.epochs.lock().unwrap().clone();
    assert_eq!(epochs.len(), 2);
    assert!(epochs[0] < epochs[1] && Some(epochs[1]) == taken.epoch, "{epochs:?}");
    assert_eq!(listener.overlaps.load(Ordering::SeqCst), 0);
    assert_eq!(taken.label, None);
    let CheckpointState::Committed(saved) = taken.state else { panic!("{:?}", taken.state) };
    assert_ne!(saved.figures["callback"], Value::Null);
}
