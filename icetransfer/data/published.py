"""Which published corpora there are in which language, under which name, and where they come from.

The one table of it: the readers, stage 0 and the recipes' README follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published corpus.

    Attributes:
        title: Its name for people.
        licence: What its publisher says.
        site: Where its files are, or, where no program may fetch them, its page.
        names: The publisher's name of each language that it has.
        absent: Why it has not the others of the recipes' languages.
        by_code: It has more languages than `names` lists, under their codes.
    """

    title: str
    licence: str
    site: str
    names: Mapping[str, str]
    absent: Mapping[str, str]
    by_code: bool = False


_FLEURS = """
    af_za am_et ar_eg as_in ast_es az_az be_by bg_bg bn_in bs_ba ca_es ceb_ph ckb_iq cs_cz cy_gb
    da_dk de_de el_gr en_us es_419 et_ee fa_ir ff_sn fi_fi fil_ph fr_fr ga_ie gl_es gu_in ha_ng
    he_il hi_in hr_hr hu_hu hy_am id_id ig_ng is_is it_it ja_jp jv_id ka_ge kam_ke kea_cv kk_kz
    km_kh kn_in ko_kr ky_kg lb_lu lg_ug ln_cd lo_la lt_lt luo_ke lv_lv mi_nz mk_mk ml_in mn_mn
    mr_in ms_my mt_mt my_mm nb_no ne_np nl_nl nso_za ny_mw oc_fr om_et or_in pa_in pl_pl ps_af
    pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th
    tr_tr uk_ua umb_ao ur_pk uz_uz vi_vn wo_sn xh_za yo_ng zu_za cmn_hans_cn yue_hant_hk
"""

PUBLISHED: Mapping[str, Published] = {
    "fleurs": Published(
        title="FLEURS",
        licence="CC BY 4.0",
        site="https://huggingface.co/datasets/google/fleurs/resolve/main/data",
        names={name.partition("_")[0]: name for name in _FLEURS.split()},
        absent={},
    ),
    "mls": Published(
        title="Multilingual LibriSpeech",
        licence="CC BY 4.0",
        site="https://dl.fbaipublicfiles.com/mls",
        names={
            "de": "german", "en": "english", "es": "spanish", "fr": "french", "it": "italian",
            "nl": "dutch", "pl": "polish", "pt": "portuguese",
        },
        absent={"ro": "LibriVox's audio books, in eight languages, none of them Romanian"},
    ),
    "common_voice": Published(
        title="Common Voice",
        licence="CC0",
        site="https://datacollective.mozillafoundation.org",
        names={code: code for code in ("de", "en", "es", "fr", "it", "nl", "pl", "pt", "ro")},
        absent={},
        by_code=True,
    ),
    "voxpopuli": Published(
        title="VoxPopuli",
        licence="CC0",
        site="https://huggingface.co/datasets/facebook/voxpopuli/resolve/main/data",
        names={code: code for code in ("de", "en", "es", "fr", "it", "nl", "pl", "ro")},
        absent={"pt": "its Portuguese recordings have no transcripts"},
    ),
}  # fmt: skip


def name_of(kind: str, language: str) -> str:
    """The publisher's name of a language.

    Args:
        kind: A key of `PUBLISHED`.
        language: Code of a language.

    Raises:
        ValueError: The corpus has not this language.
    """
    corpus = PUBLISHED[kind]
    if corpus.by_code:
        return language
    if language not in corpus.names:
        reason = corpus.absent.get(language, f"it has {', '.join(corpus.names)}")
        raise ValueError(
            f"{corpus.title} has no transcribed {language!r}: {reason}; take it out of data.corpora"
        )
    return corpus.names[language]
