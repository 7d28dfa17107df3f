"""Instructions of compiled kernels, counted."""

from machine_code import longest_loop

ASSEMBLY = """
        /*0000*/                   S2R R0, SR_TID.X ;  /* 0x0000000000007919 */
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   IADD3 R2, P1, R2, 0x4, RZ ;
        /*0030*/               @P1 BRA 0x20 ;
        /*0040*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0050*/                   FFMA R6, R5, R4, R6 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R6 ;
        /*0070*/              @!P0 BRA 0x40 ;
        /*0080*/               @P2 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def test_the_loop_that_moves_most_is_counted_without_the_one_around_it():
    assert longest_loop(ASSEMBLY) == 4
    assert longest_loop("        /*0000*/                   EXIT ;") == 0
