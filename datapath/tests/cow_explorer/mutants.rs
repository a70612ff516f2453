// SPDX-License-Identifier: GPL-2.0-or-later
//! The explorer can fail: each mistake in the rules or in the engine around them leads to a state that it rejects.

use crate::explore::{explore, Property};
use crate::rules::{Model, Mutant};
use crate::scenarios;
use crate::world::Scenario;

/// Which property the shortest path to a violation breaks.
fn broken(model: &Model) -> Property {
    match explore(model) {
        Ok(report) => panic!(
            "{:?} survives {} states of {}",
            model.mutant, report.states, model.scenario.name
        ),
        Err(counterexample) => {
            println!("{:?}: {counterexample}", model.mutant);
            counterexample.violation.property
        }
    }
}

fn caught(mutant: Mutant, scenario: Scenario, property: Property) {
    assert_eq!(broken(&Model::new(scenario, Some(mutant))), property, "{mutant:?}");
}

/// Writes too early, and by that changes what an image shows.
fn caught_twice(mutant: Mutant, scenario: Scenario) {
    caught(mutant, scenario.clone(), Property::EarlyWrite);
    let mut model = Model::new(scenario, Some(mutant));
    model.check_submissions = false;
    assert_eq!(
        broken(&model),
        Property::ImageBytes,
        "{mutant:?} without a check of submissions"
    );
}

#[test]
fn writes_that_ignore_readers() {
    caught_twice(Mutant::WritesIgnoreReaders, scenarios::WRITER_AND_READER);
}

#[test]
fn readers_that_are_not_counted() {
    caught_twice(Mutant::ReadersUncounted, scenarios::WRITER_AND_READER);
}

#[test]
fn a_write_that_looks_at_its_first_chunk_only() {
    caught_twice(Mutant::FirstChunkOnly, scenarios::WRITERS);
}

#[test]
fn a_write_that_asks_the_newest_image_only() {
    caught_twice(Mutant::NewestImageOnly, scenarios::TWO_IMAGES);
}

#[test]
fn a_state_set_after_the_submission() {
    caught_twice(Mutant::StateAfterSubmit, scenarios::THREE_WRITERS);
}

#[test]
fn readers_that_never_end() {
    caught(Mutant::ReadersNeverEnd, scenarios::WRITER_AND_READER, Property::Stuck);
}

#[test]
fn a_reader_that_is_wrongly_the_last() {
    caught(Mutant::EachReaderIsLast, scenarios::TWO_READERS, Property::WrongAnswer);
}

#[test]
fn done_before_the_store_is() {
    caught(Mutant::DoneBeforeStored, scenarios::WRITERS, Property::ImageBytes);
}

#[test]
fn a_state_stored_before_the_slot() {
    caught(Mutant::StateBeforeSlot, scenarios::WRITERS, Property::WrongAnswer);
}

#[test]
fn a_read_of_the_origin_during_the_copy() {
    caught(Mutant::ReadDuringCopy, scenarios::WRITER_AND_READER, Property::Panic);
}

#[test]
fn an_image_write_during_the_store() {
    caught(
        Mutant::ImageWriteWhileStoring,
        scenarios::TWO_IMAGE_WRITERS,
        Property::ImageBytes,
    );
}

#[test]
fn a_half_read_chunk_recovered_as_copied() {
    caught(Mutant::RecoverReadingAsCopied, scenarios::WRITERS, Property::ImageBytes);
}

#[test]
fn a_copied_chunk_recovered_as_untouched() {
    caught(Mutant::RecoverStoringAsNone, scenarios::WRITERS, Property::ImageBytes);
}

#[test]
fn a_zero_chunk_recovered_as_untouched() {
    caught(Mutant::RecoverZeroAsNone, scenarios::ZERO_CHUNKS, Property::ImageBytes);
}

#[test]
fn a_recovery_that_does_not_know_the_mark() {
    caught(Mutant::RecoverIgnoresMark, scenarios::WRITERS, Property::WrongAnswer);
}

#[test]
fn a_second_copy_of_a_chunk() {
    caught(Mutant::CopyTwice, scenarios::WRITER_AND_READER, Property::Panic);
}

#[test]
fn a_take_amid_writes() {
    caught(Mutant::TakeWithoutDrain, scenarios::TAKE, Property::ImageBytes);
}

#[test]
fn staging_freed_before_the_store() {
    caught(Mutant::StagingFreedEarly, scenarios::WRITERS, Property::ImageBytes);
}

#[test]
fn staging_lost_on_zero_chunks() {
    caught(Mutant::StagingLeaksOnZero, scenarios::ZEROS_ONLY, Property::Stuck);
}

#[test]
fn materialised_chunks_that_are_not_zero() {
    caught(
        Mutant::MaterialiseUnfilled,
        scenarios::ZERO_CHUNKS,
        Property::ImageBytes,
    );
}

#[test]
fn writes_that_outlive_their_process() {
    caught(Mutant::OrphansOutliveRecovery, scenarios::WRITERS, Property::LostWrite);
}

#[test]
fn an_acknowledgement_before_the_write() {
    caught(Mutant::AcknowledgedEarly, scenarios::WRITERS, Property::LostWrite);
}

#[test]
fn an_acknowledgement_before_the_image_write() {
    caught(
        Mutant::ImageAcknowledgedEarly,
        scenarios::TWO_IMAGE_WRITERS,
        Property::LostWrite,
    );
}
