//! Any machine, any number of times, against itself.

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::image::{restore, save};
use crate::machine::{Machine, Pieces, hot, live, read};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_machine_comes_back_whatever_was_on_the_volume_before(seed: u64) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut pages = ckpt::memory::MemoryPages::new(1 << 34);
        let mut machine = Machine::random(&mut random);
        for _ in 0..4 {
            let stream =
                if random.random_bool(0.5) { hot(&machine) } else { live(&machine, &mut random) };
            let expected = read(&stream[..]).unwrap();
            prop_assert_eq!(&expected.0, &machine);
            let (saved, _) = save(&stream, pages).unwrap();
            let (same, progress) = save(&stream, saved).unwrap();
            // Live, what a page held before its last version is written as well, unless both are in one batch.
            prop_assert!(progress.changed == 0 || !expected.1.commands.is_empty());
            let (restored, stream) = restore(same).unwrap();
            let chunks = Pieces { bytes: &stream, random: SmallRng::seed_from_u64(seed) };
            prop_assert_eq!(read(chunks).unwrap(), expected);
            pages = restored;
            if random.random_bool(0.5) {
                machine.run(&mut random);
            } else {
                machine = Machine::random(&mut random);
            }
        }
    }
}
